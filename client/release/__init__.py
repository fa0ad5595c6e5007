"""What may leave the site: the guard, the row sets, the budget, the approval and the ledger, one step each."""
