"""Agents for `esper_env`: a recurrent PPO in one file, baselines and evaluation."""
