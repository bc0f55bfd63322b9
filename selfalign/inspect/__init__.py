"""What a trained model learnt and does."""
