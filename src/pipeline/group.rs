//! Linears that share statistics, solved one after the other with one factor.

use super::inputs::{Shared, Summed};
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
use crate::statistics::Statistics;
use crate::{Matrix, Result};
use std::ops::Range;

/// What is known of a group beside its factor.
struct Known {
    group: usize,
    effective_sample_size: f64,
    /// Whether α was to be found on samples held out, and none could be.
    is_unjudged: bool,
    weight_share: Option<std::collections::BTreeMap<String, f64>>,
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
        let mut own = Vec::new();
        for (index, ((group, team), summed)) in groups.iter().zip(teams).zip(summed).enumerate() {
            let place = team
                .iter()
                .position(|rank| *rank == self.communicator.rank());
            if let Some((place, summed)) = place.zip(summed) {
                let place = (place, team.len());
                own.extend(self.solve_share((index, group), summed, place)?);
            }
            if self.communicator.is_alone() {
                // Nothing is waited for: what is solved need not be held.
                self.take_all(std::mem::take(&mut own), Some(quantized), sink)?;
            }
        }
        let all = self.timed("exchange", |run| together(own, run.communicator))?;
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

    /// Solves a group's linears, or the rows of them that belong to a `place` in a team of so many.
    pub(super) fn solve_share(
        &mut self,
        (index, group): (usize, &Shared),
        summed: Summed,
        place: (usize, usize),
    ) -> Result<Vec<Share>> {
        let Some(first) = group.modules.first() else {
            return Ok(Vec::new());
        };
        let Summed {
            statistics,
            part,
            weight_share,
        } = summed;
        if first.slot.expert.is_some() && statistics.weight_sum() == 0.0 {
            return self.round_unreached((index, group), place);
        }
        let names = group.modules.iter().map(|module| module.name.clone());
        let squares = || statistics.input_squares(names.collect());
        let mut squares = (place.0 == 0).then(squares);
        let effective_sample_size = statistics.effective_sample_size();
        let (factor, is_unjudged) = self.factor(&first.name, statistics, part)?;
        let known = Known {
            group: index,
            effective_sample_size,
            is_unjudged,
            weight_share: weight_share.map(|share| share.by_name()),
        };
        let mut shares = Vec::new();
        for module in &group.modules {
            self.check_cancelled()?;
            let rows = rows_of(module.shape[0], place.0, place.1);
            let Some(scheme) = self.recipe.scheme_of(&module.name) else {
                continue;
            };
            if rows.is_empty() {
                continue;
            }
            let mut solved = self.solve_rows(module, rows, scheme, &factor, &known)?;
            solved.told.squares = squares.take();
            shares.push(solved);
        }
        Ok(shares)
    }

    fn solve_rows(
        &mut self,
        module: &Module,
        rows: Range<usize>,
        scheme: Scheme,
        factor: &Factor,
        known: &Known,
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

    /// The factor, and whether α was to be found on samples held out, and none could be.
    fn factor(
        &mut self,
        module: &str,
        statistics: Statistics,
        part: Option<Statistics>,
    ) -> Result<(Factor, bool)> {
        // Where all samples or none are in the part, nothing is held out.
        let whole = statistics.weight_sum();
        let is_judged = |p: &Statistics| p.weight_sum() > 0.0 && p.weight_sum() < whole;
        let is_unjudged = part.as_ref().is_some_and(|part| !is_judged(part));
        let factor = self.timed("factor", |run| {
            let settings = &run.recipe.solver;
            let part = part.filter(|_| !is_unjudged);
            Factor::new(run.engine, module, statistics, part, settings)
        })?;
        Ok((factor, is_unjudged))
    }

    /// Rounds the linears of an expert that no token was sent to: nothing is known of its inputs.
    fn round_unreached(
        &mut self,
        (index, group): (usize, &Shared),
        place: (usize, usize),
    ) -> Result<Vec<Share>> {
        let mut shares = Vec::new();
        for module in &group.modules {
            self.check_cancelled()?;
            let rows = rows_of(module.shape[0], place.0, place.1);
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
                group: index,
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
