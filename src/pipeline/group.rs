//! Linears that share statistics, solved one after the other with one factor.

use super::inputs::{Shared, Summed};
use super::prepared::{Known, Prepared};
use super::share::{Share, Told, together};
use super::teams::{Cost, rows_of, teams};
use super::{Run, blank_report};
use crate::engine::Factor;
use crate::model::decoder::DecoderLayer;
use crate::model::source::Module;
use crate::pipeline::LayerSink;
use crate::plan::Scheme;
use crate::report::{Deviation, ModuleReport};
use crate::solver::{Clip, Target, rtn};
use crate::{Matrix, Result};
use std::ops::Range;

/// What this rank has to do with a group.
#[derive(Clone, Copy)]
pub(super) struct Task<'a> {
    /// The group's place among those that are solved at once.
    pub(super) index: usize,
    pub(super) group: &'a Shared,
    /// The ranks that solve it.
    pub(super) team: &'a [usize],
    /// Which of them this is.
    pub(super) place: usize,
}

impl Task<'_> {
    /// What errors and reports call it.
    pub(super) fn name(&self) -> &str {
        self.group.name()
    }

    fn rows_of(&self, module: &Module) -> Range<usize> {
        rows_of(module.shape[0], self.place, self.team.len())
    }
}

impl Run<'_> {
    /// The ranks that solve each of some groups.
    pub(super) fn teams(&self, groups: &[Shared]) -> Vec<Vec<usize>> {
        let with_target = self.recipe.solver.target != Target::Pull;
        let costs = groups.iter().map(|group| {
            let shapes = group.modules.iter().map(|module| module.shape);
            Cost::of(&shapes.collect::<Vec<_>>(), with_target)
        });
        teams(&costs.collect::<Vec<_>>(), self.communicator.n_ranks())
    }

    /// Solves groups, each at its team, and hands over their linears. `summed` is there of those that
    /// this rank has a part in.
    pub(super) fn solve_groups(
        &mut self,
        groups: &[Shared],
        teams: &[Vec<usize>],
        summed: Vec<Option<Summed>>,
        quantized: &mut DecoderLayer,
        sink: &mut dyn LayerSink,
    ) -> Result<()> {
        let rank = self.communicator.rank();
        let groups = groups.iter().enumerate().zip(teams).zip(summed);
        let mut own = groups.filter_map(|(((index, group), team), summed)| {
            let place = team.iter().position(|member| *member == rank)?;
            let task = Task {
                index,
                group,
                team,
                place,
            };
            Some((task, summed?))
        });
        let mut solved = Vec::new();
        if teams.iter().any(|team| team.len() > 1) {
            // One group a rank at most, and all ranks meet over their factors.
            let own = own.next();
            let task = own.as_ref().map(|(task, _)| *task);
            let prepared = self.prepared_in_team(own)?;
            if let Some(task) = task {
                solved = self.solve_share(&task, prepared)?;
            }
        } else {
            for (task, summed) in own {
                let prepared = self.prepared(&task, summed)?;
                solved.extend(self.solve_share(&task, prepared)?);
                if self.communicator.is_alone() {
                    // Nothing is waited for: what is solved need not be held.
                    self.take_all(std::mem::take(&mut solved), Some(quantized), sink)?;
                }
            }
        }
        let all = self.timed("exchange", |run| together(solved, run.communicator))?;
        self.take_all(all, Some(quantized), sink)
    }

    pub(super) fn take_all(
        &mut self,
        linears: Vec<Share>,
        mut quantized: Option<&mut DecoderLayer>,
        sink: &mut dyn LayerSink,
    ) -> Result<()> {
        for Share { told, weight } in linears {
            let own = self.modules.iter().find(|m| m.name == told.report.name);
            let Some(module) = own.cloned() else {
                continue;
            };
            self.take(&module, &weight, quantized.as_deref_mut(), sink)?;
            self.outcome.input_squares.extend(told.squares);
            self.outcome.deviations.extend(told.deviations);
            let relative = |loss: f64| loss / told.energy.max(f64::MIN_POSITIVE);
            self.outcome.modules.push(ModuleReport {
                relative_loss: told.report.loss.map(relative),
                ..told.report
            });
        }
        Ok(())
    }

    /// Solves the rows of a group's linears that are this rank's part.
    pub(super) fn solve_share(
        &mut self,
        task: &Task<'_>,
        prepared: Option<Prepared>,
    ) -> Result<Vec<Share>> {
        let Some(mut prepared) = prepared else {
            return self.round_unreached(task);
        };
        let mut shares = Vec::new();
        for module in &task.group.modules {
            self.check_cancelled()?;
            let rows = task.rows_of(module);
            let Some(scheme) = self.recipe.scheme_of(&module.name) else {
                continue;
            };
            if rows.is_empty() {
                continue;
            }
            let mut solved = self.solve_rows(module, rows, scheme, &prepared)?;
            solved.told.squares = prepared.known.squares.take();
            shares.push(solved);
        }
        Ok(shares)
    }

    fn solve_rows(
        &mut self,
        module: &Module,
        rows: Range<usize>,
        scheme: Scheme,
        Prepared { factor, known }: &Prepared,
    ) -> Result<Share> {
        let mut settings = self.recipe.solver.clone();
        settings.alpha = match known.is_unjudged {
            true => 0.0,
            false => self.recipe.alpha(scheme),
        };
        let w = self.timed("load", |run| run.source.weight(module.slot))?;
        let solved = self.timed("solve", |_| {
            factor.solve(&module.name, &w, rows.clone(), scheme, &settings)
        })?;
        let nearest_loss = self.nearest_loss(&module.name, rows_in(w, rows), factor, scheme)?;
        let report = ModuleReport {
            loss: Some(solved.loss),
            nearest_loss,
            dampening_frac: Some(solved.dampening_frac),
            alpha: Some(f64::from(solved.alpha)),
            n_dead_columns: Some(solved.n_dead_columns),
            effective_sample_size: Some(known.effective_sample_size),
            weight_share: known.weight_share.clone(),
            ..blank_report(module, Some(scheme))
        };
        Ok(Share {
            told: Told {
                group: known.group,
                report,
                energy: solved.energy,
                deviations: deviations(module, factor, known),
                squares: None,
            },
            weight: solved.weight,
        })
    }

    /// The loss of the weight rounded to nearest, where the report is to tell it.
    fn nearest_loss(
        &mut self,
        name: &str,
        w: Matrix,
        factor: &Factor,
        scheme: Scheme,
    ) -> Result<Option<f64>> {
        if self.kept_samples.is_none() {
            return Ok(None);
        }
        self.timed("report", |_| {
            let nearest = rtn(name, &w, scheme, Clip::None)?;
            factor.loss(&w, &nearest).map(Some)
        })
    }

    /// Rounds the linears of an expert that no token was sent to: nothing is known of its inputs.
    fn round_unreached(&mut self, task: &Task<'_>) -> Result<Vec<Share>> {
        let mut shares = Vec::new();
        for module in &task.group.modules {
            self.check_cancelled()?;
            let rows = task.rows_of(module);
            let Some(scheme) = self.recipe.scheme_of(&module.name) else {
                continue;
            };
            if rows.is_empty() {
                continue;
            }
            let clip = self.recipe.solver.clip;
            let w = self.timed("load", |run| run.source.weight(module.slot))?;
            let w = rows_in(w, rows);
            let weight = self.timed("solve", |_| rtn(&module.name, &w, scheme, clip))?;
            let told = Told {
                group: task.index,
                report: blank_report(module, Some(scheme)),
                energy: 0.0,
                deviations: vec![Deviation::Unreached {
                    module: module.name.clone(),
                }],
                squares: None,
            };
            shares.push(Share { told, weight });
        }
        Ok(shares)
    }
}

fn rows_in(w: Matrix, rows: Range<usize>) -> Matrix {
    match rows.len() == w.rows() {
        true => w,
        false => w.copy_rows(rows),
    }
}

/// What of a linear went another way than planned.
fn deviations(module: &Module, factor: &Factor, known: &Known) -> Vec<Deviation> {
    let name = || module.name.clone();
    let mut found = Vec::new();
    for damping in factor.dampings() {
        if !damping.tried.is_empty() {
            found.push(Deviation::DampingRaised {
                module: name(),
                tried: damping.tried,
                used: damping.used,
                of_part: damping.of_part,
            });
        }
    }
    if known.effective_sample_size < module.shape[1] as f64 {
        found.push(Deviation::FewTokens {
            module: name(),
            effective_sample_size: known.effective_sample_size,
            in_features: module.shape[1],
        });
    }
    if known.is_unjudged {
        found.push(Deviation::UnjudgedAlpha { module: name() });
    }
    found
}
