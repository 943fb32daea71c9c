"""Every column that a run writes, stated once: `docs/metrics.md` is held against this."""

from __future__ import annotations

from typing import NamedTuple

import pyarrow as pa


class Column(NamedTuple):
    """One key of `metrics.jsonl` or one column of the client parts."""

    name: str
    type: str
    unit: str
    meaning: str
    tag: str = ""  # where TensorBoard shows it


# A dict-valued column shows each of its entries as tag/<entry>.
METRICS_COLUMNS: tuple[Column, ...] = (
    Column("round", "int", "1", "Number of the round, from 1."),
    Column("phase", "string", "1", "Name of the algorithm's phase that the round belongs to."),
    Column(
        "loss_train",
        "float",
        "nats",
        "Training loss of the cohort, mean over samples and local steps.",
        "loss/train",
    ),
    Column(
        "acc_global",
        "float",
        "0–1",
        "Accuracy of the super-network on all samples of the held-out clients, sample-weighted.",
        "accuracy/global",
    ),
    Column(
        "acc_local",
        "float",
        "0–1",
        "Mean over clients, unweighted, of a client's own network on its test part before merging.",
        "accuracy/local",
    ),
    Column(
        "acc_local_sd",
        "float",
        "0–1",
        "Sample standard deviation of the same over clients.",
        "accuracy/local_sd",
    ),
    Column(
        "acc_local_worst10",
        "float",
        "0–1",
        "Mean of the same over the worst tenth of clients.",
        "accuracy/local_worst10",
    ),
    Column(
        "acc_local_tier",
        "dict of float",
        "0–1",
        "`acc_local` of the clients of each tier, by tier.",
        "accuracy/local_tier",
    ),
    Column(
        "acc_local_sd_tier",
        "dict of float",
        "0–1",
        "`acc_local_sd` of the clients of each tier, by tier.",
        "accuracy/local_sd_tier",
    ),
    Column(
        "acc_local_worst10_tier",
        "dict of float",
        "0–1",
        "`acc_local_worst10` of the clients of each tier, by tier.",
        "accuracy/local_worst10_tier",
    ),
    Column(
        "acc_tier",
        "dict of float",
        "0–1",
        "Accuracy on the held-out clients of the sub-network that each tier is given, by tier.",
        "accuracy/tier",
    ),
    Column(
        "acc_own",
        "float",
        "0–1",
        "Accuracy of the evaluated clients' own networks, sample-weighted as `acc_global`.",
        "accuracy/own",
    ),
    Column(
        "acc_own_sd",
        "float",
        "0–1",
        "Sample standard deviation over clients of the accuracy of their own networks.",
        "accuracy/own_sd",
    ),
    Column(
        "acc_own_worst10",
        "float",
        "0–1",
        "Mean of the same over the worst tenth of clients.",
        "accuracy/own_worst10",
    ),
    Column(
        "acc_own_tier",
        "dict of float",
        "0–1",
        "`acc_own` of the clients of each tier, by tier.",
        "accuracy/own_tier",
    ),
    Column(
        "loss_global",
        "float",
        "nats",
        "Loss of the super-network on the samples of `acc_global`.",
        "loss/global",
    ),
    Column(
        "loss_own",
        "float",
        "nats",
        "Loss of the own networks on the samples of `acc_own`.",
        "loss/own",
    ),
    Column("clients", "int", "clients", "Clients whose updates were merged.", "fleet/clients"),
    Column(
        "samples",
        "int",
        "samples",
        "Training samples of those clients, each once.",
        "fleet/samples",
    ),
    Column(
        "bytes_up",
        "int",
        "bytes",
        "Sent by all clients of the round, maps included.",
        "cost/bytes_up",
    ),
    Column(
        "bytes_down",
        "int",
        "bytes",
        "Sent to all clients of the round, maps included, also to those that dropped out later.",
        "cost/bytes_down",
    ),
    Column("bytes_map", "int", "bytes", "Index maps' part of the two, together.", "cost/bytes_map"),
    Column(
        "flops",
        "float",
        "FLOPs",
        "Local training of all clients of the round: the sum of their `flops`.",
        "cost/flops",
    ),
    Column(
        "seconds",
        "dict of float",
        "s",
        "Wall-clock time of the coordinator, by part of the round.",
        "platform/seconds",
    ),
    Column(
        "sim_seconds",
        "float",
        "s",
        "Simulated time of the round on the fleet's devices, waiting for the first included.",
        "cost/sim_seconds",
    ),
    Column("sim_time", "float", "s", "Simulated time since the start of the run.", "cost/sim_time"),
    Column(
        "energy_j", "float", "J", "Simulated energy of all clients of the round.", "cost/energy_j"
    ),
    Column(
        "clients_per_s",
        "float",
        "clients/s",
        "Clients trained for each second of wall-clock time of the round.",
        "platform/clients_per_s",
    ),
    Column(
        "memory",
        "int",
        "bytes",
        "Resident memory, when the round was over, of the process that runs the rounds.",
        "platform/memory",
    ),
    Column(
        "coverage_min",
        "int",
        "clients",
        "Clients that trained the least-trained unit of the super-network.",
        "fleet/coverage_min",
    ),
    Column(
        "coverage",
        "dict of int",
        "clients",
        "The same by unit group: clients that trained the least-trained unit of each.",
    ),
    Column(
        "keep",
        "dict of float",
        "0–1",
        "Share of the merged clients that trained a unit, mean over the units of each group.",
    ),
    Column("retries", "int", "bundles", "Bundles that had to be run again.", "platform/retries"),
    Column(
        "out_of_memory",
        "int",
        "times",
        "Memory ran out: the round began anew with half as many clients of a variant side by side.",
        "platform/out_of_memory",
    ),
    Column(
        "dropped",
        "int",
        "clients",
        "Clients that failed or left: charged, not trained.",
        "fleet/dropped",
    ),
    Column(
        "late",
        "int",
        "clients",
        "Clients not among the first, or after the round's deadline: charged, not trained.",
        "fleet/late",
    ),
    Column(
        "drop_rate",
        "float",
        "0–1",
        "`dropped` as a share of the round's clients.",
        "fleet/drop_rate",
    ),
    Column(
        "straggler_rate",
        "float",
        "0–1",
        "`late` as a share of the round's clients.",
        "fleet/straggler_rate",
    ),
)

CLIENTS_COLUMNS: tuple[Column, ...] = (
    Column("round", "int32", "1", "Number of the round, from 1."),
    Column("client", "int64", "1", "Number of the client in the store."),
    Column("tier", "string", "1", "Name of the client's budget tier."),
    Column("num_samples", "int32", "samples", "Its training samples."),
    Column("loss", "float32", "nats", "Its training loss, mean over its local steps."),
    Column("acc_local", "float32", "0–1", "Accuracy on its own test part before merging."),
    Column("seconds", "float32", "s", "Wall-clock time of its training on the host."),
    Column("params", "int64", "numbers", "Trained parameters of its sub-network."),
    Column("macs", "int64", "MACs", "A forward pass of its sub-network on one sample."),
    Column(
        "units",
        "string",
        "units",
        "How many units of each group its sub-network keeps, in the order of `network.json`.",
    ),
    Column(
        "flops",
        "float64",
        "FLOPs",
        "Its local training: forward and backward through the network that it was given.",
    ),
    Column("bytes_up", "int64", "bytes", "Sent by it, map included."),
    Column("bytes_down", "int64", "bytes", "Sent to it, map included."),
    Column("steps", "int32", "steps", "Local optimiser steps."),
    Column(
        "status",
        "string",
        "1",
        "`ok`, or why it was not merged: `skipped` (non-finite), `late`, `failed`, `unavailable`.",
    ),
    Column(
        "sim_seconds",
        "float64",
        "s",
        "Simulated time from the round's start until it arrived, failed, left or was given up.",
    ),
    Column("energy_j", "float64", "J", "Simulated energy of its computing and messages."),
)

_ARROW = {
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    # Few distinct values on many rows: stored once each.
    "string": pa.dictionary(pa.int32(), pa.string()),
}
CLIENTS_SCHEMA = pa.schema([(column.name, _ARROW[column.type]) for column in CLIENTS_COLUMNS])
