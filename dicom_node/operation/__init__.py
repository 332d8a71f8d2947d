"""What an operator asks: does it work, what is owed, what does it conform to."""
