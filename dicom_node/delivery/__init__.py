"""What archives are owed, sent until they have it and, where they are asked, keep it."""
