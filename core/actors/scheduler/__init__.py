"""The scheduler: see scheduler.py."""

from penstock.core.actors.scheduler.board import SchedulerSettings as SchedulerSettings
from penstock.core.actors.scheduler.scheduler import Scheduler as Scheduler
