"""The cost of compression: arithmetic, the ledger of a prefill, and the account that fills it."""
