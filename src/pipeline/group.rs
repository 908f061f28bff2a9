//! Linears that share statistics, solved one after the other with one factor.

use super::inputs::Summed;
use super::{Run, blank_report};
use crate::engine::Factor;
use crate::model::decoder::DecoderLayer;
use crate::model::source::Module;
use crate::pipeline::LayerSink;
use crate::plan::Scheme;
use crate::report::{Deviation, ModuleReport};
use crate::solver::{Clip, rtn};
use crate::statistics::Statistics;
use crate::{Matrix, Result};

impl Run<'_> {
    pub(super) fn solve_group(
        &mut self,
        modules: &[Module],
        summed: Summed,
        quantized: &mut DecoderLayer,
        sink: &mut dyn LayerSink,
    ) -> Result<()> {
        let Some(first) = modules.first() else {
            return Ok(());
        };
        let Summed {
            statistics,
            part,
            weight_share,
        } = summed;
        if first.slot.expert.is_some() && statistics.weight_sum() == 0.0 {
            return self.round_unreached(modules, quantized, sink);
        }
        let effective_sample_size = statistics.effective_sample_size();
        let names = modules.iter().map(|module| module.name.clone()).collect();
        let squares = statistics.input_squares(names);
        self.outcome.input_squares.push(squares);
        let (factor, is_unjudged) = self.factor(&first.name, statistics, part)?;
        for module in modules {
            self.check_cancelled()?;
            let Some(scheme) = self.recipe.scheme_of(&module.name) else {
                continue;
            };
            let mut settings = self.recipe.solver.clone();
            settings.alpha = match is_unjudged {
                true => 0.0,
                false => self.recipe.alpha(scheme),
            };
            let w = self.timed("load", |run| run.source.weight(module.slot))?;
            let solved = self.timed("solve", |_| {
                factor.solve(&module.name, &w, scheme, &settings)
            })?;
            let nearest_loss = self.nearest_loss(&module.name, &w, &factor, scheme)?;
            drop(w);
            self.take(module, &solved.weight, quantized, sink)?;
            self.note_deviations(module, &factor, effective_sample_size);
            if is_unjudged {
                self.outcome.deviations.push(Deviation::UnjudgedAlpha {
                    module: module.name.clone(),
                });
            }
            self.outcome.modules.push(ModuleReport {
                loss: Some(solved.loss),
                nearest_loss,
                relative_loss: Some(solved.loss / solved.energy.max(f64::MIN_POSITIVE)),
                dampening_frac: Some(solved.dampening_frac),
                alpha: Some(f64::from(solved.alpha)),
                n_dead_columns: Some(solved.n_dead_columns),
                effective_sample_size: Some(effective_sample_size),
                weight_share: weight_share.clone().map(|share| share.by_name()),
                ..blank_report(module, Some(scheme))
            });
        }
        Ok(())
    }

    /// The loss of the weight rounded to nearest, where the report is to tell it.
    fn nearest_loss(
        &mut self,
        name: &str,
        w: &Matrix,
        factor: &Factor,
        scheme: Scheme,
    ) -> Result<Option<f64>> {
        if self.kept_samples.is_none() {
            return Ok(None);
        }
        self.timed("report", |_| {
            let nearest = rtn(name, w, scheme, Clip::None)?;
            factor.loss(w, &nearest).map(Some)
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
        modules: &[Module],
        quantized: &mut DecoderLayer,
        sink: &mut dyn LayerSink,
    ) -> Result<()> {
        for module in modules {
            self.check_cancelled()?;
            let Some(scheme) = self.recipe.scheme_of(&module.name) else {
                continue;
            };
            let clip = self.recipe.solver.clip;
            let w = self.timed("load", |run| run.source.weight(module.slot))?;
            let weight = self.timed("solve", |_| rtn(&module.name, &w, scheme, clip))?;
            self.take(module, &weight, quantized, sink)?;
            self.outcome.deviations.push(Deviation::Unreached {
                module: module.name.clone(),
            });
            self.outcome
                .modules
                .push(blank_report(module, Some(scheme)));
        }
        Ok(())
    }

    fn note_deviations(&mut self, module: &Module, factor: &Factor, effective_sample_size: f64) {
        let name = || module.name.clone();
        for damping in factor.dampings() {
            if !damping.tried.is_empty() {
                self.outcome.deviations.push(Deviation::DampingRaised {
                    module: name(),
                    tried: damping.tried,
                    used: damping.used,
                    of_part: damping.of_part,
                });
            }
        }
        if effective_sample_size < module.shape[1] as f64 {
            self.outcome.deviations.push(Deviation::FewTokens {
                module: name(),
                effective_sample_size,
                in_features: module.shape[1],
            });
        }
    }
}
