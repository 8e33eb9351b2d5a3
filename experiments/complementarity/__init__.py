"""What thumbnail and crops each contribute to the answers."""
