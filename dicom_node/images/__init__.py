"""What a stored image is, byte by byte and frame by frame, and whether it is one to analyse."""
