"""Agents for `esper_env`: recurrent PPO in one file, baselines and evaluation."""
