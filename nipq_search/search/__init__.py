"""The search: budgets, ledger, executor. The only place that imports ray and optuna."""
