"""The failures of `tests.plants` as code: what each does to a job."""
