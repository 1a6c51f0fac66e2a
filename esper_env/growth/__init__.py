"""The decision process: slot state, lifecycle, actions and masks, observation, reward, rollback."""
