//! `config.json` of a model and of quantized weights, over tensors that suit a genuine one.

#![no_main]

use candle_core::Device;
use libfuzzer_sys::fuzz_target;
use vlmq::checkpoint::write::{MAX_SHARD_BYTES, ShardedWriter, TensorSpec};
use vlmq::checkpoint::{CONFIG_FILE, Checkpoint, DType};
use vlmq::families::open_model;

fuzz_target!(
    init: { put_weights(); },
    |data: &[u8]| {
        vlmq_fuzz::put(CONFIG_FILE, data);
        let Ok(checkpoint) = Checkpoint::open(vlmq_fuzz::folder()) else {
            return;
        };
        vlmq_fuzz::read_all(&checkpoint);
        if let Ok(model) = open_model(checkpoint, Device::Cpu) {
            model.modules();
        }
    }
);

/// The weights of a model with one layer, and one quantized linear.
fn put_weights() {
    let layer = "model.layers.0";
    let weights: [(&str, &[usize]); 10] = [
        ("model.embed_tokens", &[6, 8]),
        (&format!("{layer}.self_attn.q_proj"), &[8, 8]),
        (&format!("{layer}.self_attn.k_proj"), &[8, 8]),
        (&format!("{layer}.self_attn.v_proj"), &[8, 8]),
        (&format!("{layer}.self_attn.o_proj"), &[8, 8]),
        (&format!("{layer}.mlp.gate_proj"), &[4, 8]),
        (&format!("{layer}.mlp.up_proj"), &[4, 8]),
        (&format!("{layer}.mlp.down_proj"), &[8, 4]),
        ("visual.patch_embed.proj", &[4, 3, 2, 1, 1]),
        ("visual.blocks.0.attn.qkv", &[12, 4]),
    ];
    let mut specs: Vec<_> = weights
        .iter()
        .map(|(name, shape)| spec(&format!("{name}.weight"), DType::F32, shape))
        .collect();
    specs.extend([
        spec("a.weight_packed", DType::I32, &[2, 2]),
        spec("a.weight_scale", DType::F32, &[2, 2]),
        spec("a.weight_zero_point", DType::I32, &[1, 2]),
        spec("a.weight_shape", DType::I64, &[2]),
    ]);
    let folder = vlmq_fuzz::folder();
    let mut writer =
        ShardedWriter::create(folder, specs.clone(), MAX_SHARD_BYTES).expect("the weights");
    for spec in &specs {
        let n_bytes = spec.dtype.n_bytes() * spec.shape.iter().product::<usize>();
        let bytes = match spec.name.as_str() {
            "a.weight_shape" => [2u64, 16].map(u64::to_le_bytes).concat(),
            "a.weight_scale" => 0.5f32.to_le_bytes().repeat(4),
            _ => vec![0; n_bytes],
        };
        writer.write(&spec.name, &bytes).expect("its data");
    }
    writer.finish().expect("the weights");
}

fn spec(name: &str, dtype: DType, shape: &[usize]) -> TensorSpec {
    TensorSpec {
        name: name.into(),
        dtype,
        shape: shape.to_vec(),
    }
}
