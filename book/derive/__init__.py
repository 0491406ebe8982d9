"""What the book derives from cards, notebooks and records. Nothing here computes a result; it only lays results out."""
