"""Many machines, on Ray: the same bundles, jobs and commands. Nothing else imports Ray."""
