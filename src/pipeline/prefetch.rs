//! The next layer's weights on their way from the disk while a GPU works on this one.
//!
//! They are read and given up again: what is left of it is the system's cache of files, from which
//! the next layer is then read. On the CPU nobody would wait, so nothing is done.

use crate::engine::Engine;
use crate::model::ModelSource;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Scope;

/// Readers, which end when they are told to.
pub(super) struct Prefetch {
    is_over: AtomicBool,
}

impl Prefetch {
    pub(super) fn new() -> Self {
        Self {
            is_over: AtomicBool::new(false),
        }
    }

    /// Begins to read layer `layer_idx`, if there is one and somebody would wait for it.
    pub(super) fn begin<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        engine: &Engine,
        model: &'scope ModelSource,
        layer_idx: usize,
    ) {
        if matches!(engine, Engine::Cpu) || layer_idx >= model.decoder().n_layers {
            return;
        }
        scope.spawn(move || {
            let prefix = format!("{}.", model.layer_source(layer_idx).prefix);
            let checkpoint = model.checkpoint();
            let names = checkpoint.names().filter(|name| name.starts_with(&prefix));
            // A tensor that cannot be read is told of when the layer is.
            let mut pieces = names
                .filter_map(|name| checkpoint.pieces(name).ok())
                .flatten();
            let goes_on = || !self.is_over.load(Ordering::Relaxed);
            while goes_on() && matches!(pieces.next(), Some(Ok(_))) {}
        });
    }

    /// What is not read yet is not waited for.
    pub(super) fn end(&self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}
