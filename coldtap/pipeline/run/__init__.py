"""Ways to run the blocks of a job: in this process, or on dask workers."""
