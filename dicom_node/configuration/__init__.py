"""The configuration file: its sections, their defaults, and what is wrong with one."""
