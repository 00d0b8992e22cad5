"""How many bits each weight and activation gets."""
