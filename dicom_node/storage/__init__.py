"""What outlives the process: slices in the spool, decisions and debts in the journal."""
