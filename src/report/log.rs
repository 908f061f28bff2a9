//! What a run has to say while it goes on, as events: one line per layer, one per module below it.

use super::{Deviation, ModuleReport, peak_memory_bytes};
use crate::pipeline::LayerOutcome;

/// One line of a layer: its losses, what the solver met, where its time went.
pub(crate) fn layer(layer_idx: usize, outcome: &LayerOutcome, was_finished: bool) {
    for module in &outcome.modules {
        log_module(module);
    }
    for deviation in &outcome.deviations {
        log_deviation(deviation);
    }
    let losses = || outcome.modules.iter().filter_map(|m| m.relative_loss);
    let highest = |values: &mut dyn Iterator<Item = f64>| values.reduce(f64::max);
    let seconds = |stage: &str| outcome.seconds.get(stage).copied().unwrap_or(0.0);
    tracing::info!(
        layer = layer_idx,
        was_finished,
        relative_loss = losses().sum::<f64>() / losses().count().max(1) as f64,
        worst_relative_loss = highest(&mut losses()),
        dampening_frac = highest(&mut outcome.modules.iter().filter_map(|m| m.dampening_frac)),
        effective_sample_size = outcome
            .modules
            .iter()
            .filter_map(|m| m.effective_sample_size)
            .reduce(f64::min),
        seconds = outcome.seconds.values().sum::<f64>(),
        load = seconds("load"),
        forward = seconds("forward"),
        importance = seconds("importance"),
        statistics = seconds("statistics"),
        factor = seconds("factor"),
        solve = seconds("solve"),
        write = seconds("write"),
        peak_memory_bytes = peak_memory_bytes(),
        "layer done"
    );
}

fn log_module(module: &ModuleReport) {
    tracing::debug!(
        module = module.name,
        relative_loss = module.relative_loss,
        dampening_frac = module.dampening_frac,
        alpha = module.alpha,
        n_dead_columns = module.n_dead_columns,
        effective_sample_size = module.effective_sample_size,
        "module done"
    );
}

fn log_deviation(deviation: &Deviation) {
    let words = serde_json::to_string(deviation).unwrap_or_default();
    tracing::info!(deviation = words, "not as planned");
}
