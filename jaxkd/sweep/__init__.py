"""Sweeps: grids of runs (`grid`), the engine over all devices (`engine`) and hosts (`hosts`), stores (`store`)."""
