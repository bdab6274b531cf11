"""A small training that saves and loads checkpoints."""

import torch
from accelerate import Accelerator
from helpers.tiny_run import reset_accelerate
from torch import nn

from loopitr.training.checkpoints import Progress, load_checkpoint, newest_checkpoint, save_checkpoint
from loopitr.training.optimization import warmup_cosine


class Work:
    """A model with dropout that learns noise: every step depends on weights, moments, rate and generators."""

    def __init__(self, seed=0, width=4):
        reset_accelerate()
        self.accelerator = Accelerator(cpu=True)
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.schedule = warmup_cosine(optimizer, steps=20, warmup=5)
        self.step = 0

    def steps(self, count):
        for _ in range(count):
            loss = self.model(torch.randn(8, 3)).square().mean()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.step += 1
        return self

    def save(self, folder, keep=2, **progress):
        return self.save_progress(folder, Progress(step=self.step, **progress), keep=keep)

    def save_progress(self, folder, progress, *, keep):
        return save_checkpoint(self.accelerator, folder, progress, keep=keep, scheduler=self.schedule)

    def load(self, folder):
        found = newest_checkpoint(folder)
        return found and load_checkpoint(self.accelerator, found.path, scheduler=self.schedule)

    def state(self):
        return {name: value.clone() for name, value in self.model.state_dict().items()}
