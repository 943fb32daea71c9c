"""The core types: index maps, costs, budgets, algorithms. Imports nothing of ours."""
