"""The inference engine both workers run: pages, prefix cache, scheduler, runner, sampler."""
