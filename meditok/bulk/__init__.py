"""Many files to tokens: plan, read in worker processes, encode, write shard by shard, go on after an interruption."""
