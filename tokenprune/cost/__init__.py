"""What compression costs: arithmetic, the ledger of a prefill, and the account that fills it."""
