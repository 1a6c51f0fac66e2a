"""Decision process: state, lifecycle, actions, masks, observation, reward, rollback, env step."""
