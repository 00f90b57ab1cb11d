"""The mathematics: noise schedules, draws, objectives. Pure functions of tensors."""
