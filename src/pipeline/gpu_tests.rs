//! The whole walk through a model with a GPU's engine, on the emulation, beside the CPU's.

use super::*;
use crate::checkpoint::Checkpoint;
use crate::dataset::open_samples;
use crate::distributed::Local;
use crate::engine::OneGpu;
use crate::gpu::{Gpu, emulated};
use crate::hidden_states::Store;
use crate::model::changed::ChangedTensor;
use crate::model::{ModelDevice, Products};
use crate::plan::ScaleDtype;
use crate::recipe::Method;
use crate::run::{Division, Room, SampleChoice, load_share};
use candle_core::Device;
use std::path::Path;
use std::sync::Arc;

/// Relative difference of a loss of the first layer's q, k and v, whose inputs are the same.
const SAME_LOSS: f64 = 0.02;

/// Share of their codes that may differ: a weight within rounding of a tie falls either way, and the
/// rest of its row follows.
const MAX_OTHER_CODES: f64 = 0.02;

/// Relative difference of all losses together. Other linears see inputs that differ by what became of
/// earlier ties, few tokens at that, and decide many a code otherwise; so do two orders of summation on
/// the CPU.
const LIKE_LOSS: f64 = 0.015;

/// The same where factors of the forward passes' products are rounded to 8 bits.
const BF16_LOSS: f64 = 0.03;

/// Keeps what it is given.
#[derive(Default)]
struct Kept(Vec<QuantizedWeight>);

impl LayerSink for Kept {
    fn module(&mut self, _: &Module, weight: &QuantizedWeight) -> Result<()> {
        self.0.push(weight.clone());
        Ok(())
    }

    fn tensor(&mut self, _: &ChangedTensor) -> Result<()> {
        Ok(())
    }

    fn kept_samples(&self) -> Option<Vec<usize>> {
        Some(vec![0])
    }
}

fn samples(
    model: &ModelSource,
    recipe: &Recipe,
    division: Division<'_>,
    store: Store,
) -> CalibrationSet {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testbed/calibration");
    let choice = SampleChoice {
        set: open_samples(&path).unwrap(),
        n_samples: 6,
        seed: 0,
        max_tokens: 512,
    };
    let room = (Room::of_memory(u64::MAX), &*std::env::temp_dir());
    let set = load_share(model, recipe, Some(&choice), division, room, &Unobserved).unwrap();
    set.moved_to(store).unwrap()
}

fn run(engine: &Engine, recipe: &Recipe, store: Store) -> (Vec<LayerOutcome>, Kept) {
    run_share(engine, recipe, Division::none(), store)
}

/// The emulation, with a model in f32.
fn on_f32(gpu: Arc<dyn Gpu>) -> Engine {
    let products = Products::F32;
    Engine::Gpu(OneGpu { gpu, products })
}

fn run_share(
    engine: &Engine,
    recipe: &Recipe,
    division: Division<'_>,
    store: Store,
) -> (Vec<LayerOutcome>, Kept) {
    let products = match engine {
        Engine::Cpu => Products::F32,
        Engine::Gpu(OneGpu { products, .. }) => *products,
    };
    let device = ModelDevice::new(Device::Cpu, products);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testbed/model");
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let model = crate::families::open_model(checkpoint, device).unwrap();
    let set = samples(&model, recipe, division, store);
    let mut kept = Kept::default();
    let among = (division.communicator, &Unobserved as &dyn Observer);
    let outcomes = layers_on(engine, &model, set, recipe, None, among, &mut kept).unwrap();
    (outcomes, kept)
}

/// Whether two numbers differ by at most a share of the second, or both are absent.
fn close_to(share: f64) -> impl Fn(Option<f64>, Option<f64>) -> bool {
    move |a, b| match (a, b) {
        (Some(a), Some(b)) => (a - b).abs() <= share * b.abs(),
        (a, b) => a == b,
    }
}

/// What is told of both runs is the same but for rounding; the GPU's states lie on the device.
#[test]
fn methods_find_on_a_gpu_what_they_find_on_the_cpu() {
    let Some(gpu) = emulated::gpu() else { return };
    let engine = on_f32(gpu);
    let scheme = Scheme::new(3, Some(64), false, ScaleDtype::Bf16).unwrap();
    for method in [Method::Gptq, Method::Vlmq] {
        let recipe = Recipe::new(method, scheme);
        let (expected, weights) = run(&Engine::Cpu, &recipe, Store::in_memory(&Device::Cpu));
        let on_device = Store::in_memory(&Device::Cpu).on_device(u64::MAX);
        let (found, others) = run(&engine, &recipe, on_device);
        let name = method.name();
        let pairs = found
            .iter()
            .zip(&expected)
            .flat_map(|(a, b)| a.modules.iter().zip(&b.modules));
        let mut sums = [0.0, 0.0];
        for (place, (found, expected)) in pairs.enumerate() {
            let (name, close) = (format!("{name} {}", expected.name), close_to(SAME_LOSS));
            assert_eq!(found.name, expected.name);
            assert_eq!(found.n_dead_columns, expected.n_dead_columns, "{name}");
            let (a, b) = (found.loss, expected.loss);
            sums[0] += a.unwrap();
            sums[1] += b.unwrap();
            if place >= 3 {
                continue;
            }
            assert!(close(a, b), "{name}: loss {a:?}, {b:?} expected");
            let (a, b) = (found.nearest_loss, expected.nearest_loss);
            assert!(
                close(a, b),
                "{name}: {a:?} rounded to nearest, {b:?} expected"
            );
            let (a, b) = (found.alpha, expected.alpha);
            assert!(close(a, b), "{name}: alpha {a:?}, {b:?} expected");
            let (a, b) = (found.effective_sample_size, expected.effective_sample_size);
            assert!(close(a, b), "{name}: {a:?} tokens, {b:?} expected");
        }
        let [a, b] = sums.map(Some);
        assert!(
            close_to(LIKE_LOSS)(a, b),
            "{name}: {a:?} in all, {b:?} expected"
        );
        let codes = |kept: &Kept| -> Vec<u8> {
            let first = kept.0[..3].iter().flat_map(QuantizedWeight::codes);
            first.copied().collect()
        };
        let (found, expected) = (codes(&others), codes(&weights));
        assert_eq!(found.len(), expected.len());
        let pairs = found.iter().zip(&expected);
        let share = pairs.filter(|(a, b)| a != b).count() as f64 / expected.len() as f64;
        assert!(
            share <= MAX_OTHER_CODES,
            "{name}: {share} of q, k and v differ"
        );
    }
}

/// Linears whose factors are rounded to bfloat16 give hidden states that differ by as much, and with
/// them losses and weights of tokens; codes part ways as under any other rounding.
#[test]
fn products_of_bf16_change_losses_by_little() {
    let Some(gpu) = emulated::gpu() else { return };
    let products = Products::Bf16;
    let engine = Engine::Gpu(OneGpu { gpu, products });
    let scheme = Scheme::new(3, Some(64), false, ScaleDtype::Bf16).unwrap();
    let recipe = Recipe::new(Method::Vlmq, scheme);
    let sum = |engine: &Engine| -> f64 {
        let (outcomes, _) = run(engine, &recipe, Store::in_memory(&Device::Cpu));
        let modules = outcomes.iter().flat_map(|outcome| &outcome.modules);
        modules.map(|module| module.loss.unwrap()).sum()
    };
    let (found, expected) = (sum(&engine), sum(&Engine::Cpu));
    assert!(found != expected, "something is rounded");
    let is_close = close_to(BF16_LOSS)(Some(found), Some(expected));
    assert!(is_close, "{found} in all, {expected} expected");
}

/// Each rank with a GPU of its own: bands of sums, rows and codes go between them as between CPUs. The
/// ranks make down's inputs again, which the one keeps.
#[test]
fn ranks_with_gpus_find_what_one_does() {
    let Some(gpu) = emulated::gpu() else { return };
    let engine = on_f32(gpu);
    let scheme = Scheme::new(3, Some(64), false, ScaleDtype::Bf16).unwrap();
    let recipe = Recipe::new(Method::Vlmq, scheme);
    let share = |communicator: &dyn Communicator| {
        let division = Division {
            communicator,
            n_shards: 2,
        };
        let mut store = Store::in_memory(&Device::Cpu).on_device(u64::MAX);
        if !communicator.is_alone() {
            store = store.without_down_inputs();
        }
        run_share(&engine, &recipe, division, store).1
    };
    let expected = share(&Alone);
    let ranks = Local::ranks(2);
    let found: Vec<Kept> = std::thread::scope(|scope| {
        let ranks = ranks.iter();
        let running: Vec<_> = ranks.map(|rank| scope.spawn(|| share(rank))).collect();
        let done = running.into_iter().map(|rank| rank.join().unwrap());
        done.collect()
    });
    for (rank, found) in found.iter().enumerate() {
        assert_eq!(found.0.len(), expected.0.len());
        for (found, expected) in found.0.iter().zip(&expected.0) {
            assert!(found.codes() == expected.codes(), "rank {rank}");
            assert!(found.scales().data() == expected.scales().data());
        }
    }
}

#[test]
fn what_a_gpu_does_not_do_is_refused() {
    let Some(gpu) = emulated::gpu() else { return };
    let engine = on_f32(gpu);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testbed/model");
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let model = crate::families::open_model(checkpoint, Device::Cpu).unwrap();
    let scheme = Scheme::new(3, Some(64), false, ScaleDtype::Bf16).unwrap();
    let recipe = |method, setting: &str| {
        let mut recipe = Recipe::new(method, scheme);
        if !setting.is_empty() {
            recipe.set(setting).unwrap();
        }
        recipe
    };
    let refused = [
        (Method::Awq, ""),
        (Method::Rtn, ""),
        (Method::Gptq, "sweeps=1"),
        (Method::Gptq, "unit_gain=true"),
    ];
    for (method, setting) in refused {
        let recipe = recipe(method, setting);
        let error = engine.check(&model, &recipe).unwrap_err();
        assert!(
            matches!(error, Error::Unsupported { .. }),
            "{method:?} {setting}"
        );
        Engine::Cpu.check(&model, &recipe).unwrap();
    }
    let allowed = recipe(Method::Vlmq, "clip=mse");
    engine.check(&model, &allowed).unwrap();
}
