"""The Job Executor: turns requests into jobs and tasks and finds each task a Task Executor."""
