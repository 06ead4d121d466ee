"""The loop: every step of a run, top to bottom.

In: a `Session` that stands at some step. Out: the session at its last step, or at the step where the ranks agreed to
stop; saved either way.
"""

from ii_dist.train.session import Session


def fit(run: Session) -> bool:
    """Train to the last step of the plan; False when asked to stop before it. Collective."""
    plan, engine, clock = run.plan, run.engine, run.clock
    batches = iter(run.train_source)
    if run.evaluation_is_due():  # the attempt before this one was stopped while it evaluated
        run.evaluate()
    while engine.step < plan.total_steps and not run.stopping:
        run.sign("data")
        run.traces.begin_step(engine.step)
        with clock.data_wait():
            micro_batches = [next(batches) for _ in range(plan.accumulate_steps)]
        run.show(micro_batches[0])
        run.sign("step")
        run.means.add(engine.train_step(micro_batches))  # device tensors: nobody waits
        clock.tick(plan.images_per_rank)
        run.watchdog.beat()
        run.vote()
        if run.log_is_due():
            run.log()
        if run.evaluation_is_due() and not run.stopping:
            run.evaluate()
        if run.save_is_due() or run.stopping:
            run.save()
    return engine.step >= plan.total_steps
