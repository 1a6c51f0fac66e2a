"""Reward: a weighted sum of terms, each a pure function of one transition."""
