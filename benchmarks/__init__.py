"""What steppe costs: step time, memory and counted work, beside plain SAM and other implementations."""
