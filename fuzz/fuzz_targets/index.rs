//! `model.safetensors.index.json` beside two shards.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vlmq::checkpoint::write::{ShardedWriter, TensorSpec};
use vlmq::checkpoint::{CONFIG_FILE, Checkpoint, DType, INDEX_FILE};

fuzz_target!(
    init: { put_shards(); },
    |data: &[u8]| {
        vlmq_fuzz::put(INDEX_FILE, data);
        if let Ok(checkpoint) = Checkpoint::open(vlmq_fuzz::folder()) {
            vlmq_fuzz::read_all(&checkpoint);
        }
    }
);

fn put_shards() {
    vlmq_fuzz::put(CONFIG_FILE, b"{}");
    let spec = |name: &str| TensorSpec {
        name: name.into(),
        dtype: DType::F32,
        shape: vec![2],
    };
    let specs = vec![spec("a"), spec("b")];
    let mut writer = ShardedWriter::create(vlmq_fuzz::folder(), specs, 8).expect("two shards");
    for name in ["a", "b"] {
        writer.write(name, &[0; 8]).expect("its data");
    }
    writer.finish().expect("the index");
}
