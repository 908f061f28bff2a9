mod formats;

use super::names::{Ignore, ignore_patterns, stable_part, topmost_free};
use super::*;
use crate::Matrix;
use crate::QuantizedWeight;
use crate::checkpoint::write::{MAX_SHARD_BYTES, ShardedWriter, TensorSpec};
use crate::checkpoint::{CONFIG_FILE, Checkpoint, PendingFolder, Quantization};
use crate::checkpoint::{INDEX_FILE, WEIGHTS_FILE};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A `[rows, 32]` weight of numbers without pattern, from a linear congruential sequence.
fn weight(scheme: Scheme, rows: usize, seed: u32) -> QuantizedWeight {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 16
    };
    let cols = 32;
    let n_groups = cols / scheme.group_len("m", cols).unwrap();
    let max = u32::from(scheme.max_code());
    let mut codes = |n: usize| {
        (0..n)
            .map(|_| (next() % (max + 1)) as u8)
            .collect::<Vec<_>>()
    };
    let (codes, mut zero_points) = (codes(rows * cols), codes(rows * n_groups));
    if scheme.symmetric() {
        zero_points.fill(1 << (scheme.bits() - 1));
    }
    let scales = Matrix::from_fn(rows, n_groups, |row, group| {
        let value = 0.01 + 0.001 * (row * 7 + group * 3) as f32;
        scheme.scale_dtype().round(value)
    });
    QuantizedWeight::new("m", scheme, [rows, cols], codes, scales, zero_points).unwrap()
}

fn scheme(bits: u8, group_size: Option<usize>, symmetric: bool) -> Scheme {
    Scheme::new(bits, group_size, symmetric, ScaleDtype::F32).unwrap()
}

const CONFIG: &str = "{\n  \"model_type\": \"qwen2_vl\",\n  \"rms_norm_eps\": 1e-06,\n  \
    \"odd\": 0.1000000000000000055511151231257827\n}\n";
const Q_PROJ: &str = "model.layers.0.self_attn.q_proj";
const DOWN_PROJ: &str = "model.layers.0.mlp.down_proj";

/// A source folder with a quantizable `[12, 32]` weight per name, and other things.
fn source(modules: &[&str]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(CONFIG_FILE), CONFIG).unwrap();
    fs::write(dir.path().join("tokenizer.json"), "{\"é\": 1}\r\n").unwrap();
    fs::write(dir.path().join("chat_template.jinja"), "{{ x }}").unwrap();
    let others: [(&str, &[usize]); 5] = [
        ("model.embed_tokens.weight", &[5, 4]),
        ("model.norm.weight", &[4]),
        ("model.layers.0.self_attn.q_proj.bias", &[12]),
        ("visual.blocks.0.attn.qkv.weight", &[3, 4]),
        ("visual.merger.mlp.0.weight", &[3, 4]),
    ];
    let mut specs: Vec<TensorSpec> = others
        .iter()
        .map(|(name, shape)| TensorSpec {
            name: (*name).to_owned(),
            dtype: DType::Bf16,
            shape: shape.to_vec(),
        })
        .collect();
    specs.extend(modules.iter().map(|module| TensorSpec {
        name: format!("{module}.weight"),
        dtype: DType::Bf16,
        shape: vec![12, 32],
    }));
    let mut writer = ShardedWriter::create(dir.path(), specs.clone(), MAX_SHARD_BYTES).unwrap();
    for (i, spec) in specs.iter().enumerate() {
        let n_bytes = 2 * spec.shape.iter().product::<usize>();
        let bytes: Vec<u8> = (0..n_bytes).map(|b| (b + 31 * i) as u8).collect();
        writer.write(&spec.name, &bytes).unwrap();
    }
    writer.finish().unwrap();
    dir
}

fn plan(modules: &[(&str, Scheme)]) -> Vec<ModulePlan> {
    let plan = modules.iter().map(|(name, scheme)| ModulePlan {
        name: (*name).to_owned(),
        scheme: *scheme,
    });
    plan.collect()
}

/// An exporter to compressed-tensors.
fn create<'a>(source: &'a Checkpoint, plan: &[ModulePlan], output: &Path) -> Result<Exporter<'a>> {
    let pending = PendingFolder::create(output)?;
    Exporter::create(
        source,
        Format::CompressedTensors,
        plan,
        pending,
        MAX_SHARD_BYTES,
    )
}

/// Exports made-up weights for `modules` from a fresh source to `output`.
fn export(modules: &[(&str, Scheme)], output: &Path, max_shard_bytes: u64) -> Exported {
    let names: Vec<&str> = modules.iter().map(|(name, _)| *name).collect();
    let dir = source(&names);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let plan = plan(modules);
    let pending = PendingFolder::create(output).unwrap();
    let mut exporter = Exporter::create(
        &checkpoint,
        Format::CompressedTensors,
        &plan,
        pending,
        max_shard_bytes,
    )
    .unwrap();
    for (i, (name, scheme)) in modules.iter().enumerate().rev() {
        let weight = weight(*scheme, 12, i as u32);
        exporter.write_module(name, &weight).unwrap();
    }
    let exported = exporter.finish().unwrap();
    let written = Checkpoint::open(output).unwrap();
    for (i, (name, scheme)) in modules.iter().enumerate() {
        let weight = weight(*scheme, 12, i as u32);
        verify_module(&written, name, &weight.dequantize()).unwrap();
        assert_eq!(written.packed_module(name).unwrap(), weight);
    }
    exported
}

fn all_schemes() -> Vec<Scheme> {
    let mut schemes = Vec::new();
    for bits in Scheme::BITS {
        for group_size in [None, Some(8), Some(16)] {
            for symmetric in [true, false] {
                schemes.push(scheme(bits, group_size, symmetric));
            }
        }
    }
    schemes
}

fn with_names(schemes: &[Scheme]) -> Vec<(String, Scheme)> {
    let name = |i| format!("model.layers.{i}.mlp.up_proj");
    schemes
        .iter()
        .enumerate()
        .map(|(i, s)| (name(i), *s))
        .collect()
}

/// Every scheme in one folder. With `VLMQ_ORACLE_OUT` set the folder is made there too, for
/// `tests/oracle/test_compressed_tensors.py`, with the weights that it should decode to.
#[test]
fn every_scheme_is_read_back_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let named = with_names(&all_schemes());
    let modules: Vec<(&str, Scheme)> = named.iter().map(|(n, s)| (n.as_str(), *s)).collect();
    let exported = export(&modules, &dir.path().join("out"), MAX_SHARD_BYTES);
    assert_eq!((exported.n_quantized, exported.n_copied), (24, 5));
    if let Some(output) = std::env::var_os("VLMQ_ORACLE_OUT").map(PathBuf::from) {
        export(&modules, &output.join("folder"), MAX_SHARD_BYTES);
        write_expected(&modules, &output);
    }
}

fn write_expected(modules: &[(&str, Scheme)], output: &Path) {
    let specs = modules.iter().map(|(name, _)| TensorSpec {
        name: (*name).to_owned(),
        dtype: DType::F32,
        shape: vec![12, 32],
    });
    let mut writer = ShardedWriter::create(output, specs.collect(), MAX_SHARD_BYTES).unwrap();
    for (i, (name, scheme)) in modules.iter().enumerate() {
        let weight = weight(*scheme, 12, i as u32).dequantize();
        let bytes = DType::F32.bytes_from_f32(weight.data()).unwrap();
        writer.write(name, &bytes).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn the_folder_is_the_source_with_weights_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("out");
    let modules = [
        (Q_PROJ, scheme(3, Some(16), false)),
        (DOWN_PROJ, scheme(3, Some(16), false)),
    ];
    let exported = export(&modules, &output, MAX_SHARD_BYTES);
    assert_eq!(
        exported.side_files,
        ["chat_template.jinja", "tokenizer.json"]
    );
    assert_eq!(
        fs::read(output.join("tokenizer.json")).unwrap(),
        "{\"é\": 1}\r\n".as_bytes()
    );
    let written = Checkpoint::open(&output).unwrap();
    let shape = |suffix: &str| {
        let info = written.info(&format!("{Q_PROJ}.{suffix}")).unwrap();
        (info.dtype, info.shape.clone())
    };
    assert_eq!(shape("weight_packed"), (DType::I32, vec![12, 3]));
    assert_eq!(shape("weight_scale"), (DType::F32, vec![12, 2]));
    assert_eq!(shape("weight_zero_point"), (DType::I32, vec![2, 2]));
    assert_eq!(shape("weight_shape"), (DType::I64, vec![2]));
    assert_eq!(shape("bias"), (DType::Bf16, vec![12]));
    assert!(!written.contains(&format!("{Q_PROJ}.weight")));
    let text = fs::read_to_string(output.join(CONFIG_FILE)).unwrap();
    let kept = CONFIG.trim_end().trim_end_matches('}').trim_end();
    assert!(text.starts_with(kept), "{text}");
    let group = &written.config()["quantization_config"]["config_groups"]["group_0"];
    assert_eq!(group["targets"], json!(["Linear"]));
    assert_eq!(group["weights"]["num_bits"], 3);
    let leftovers = fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(leftovers, 1);
}

#[test]
fn shards_and_mixed_schemes_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("out");
    let modules = [
        (Q_PROJ, scheme(4, Some(16), true)),
        (DOWN_PROJ, scheme(2, None, false)),
        ("model.layers.1.mlp.down_proj", scheme(4, Some(16), true)),
    ];
    export(&modules, &output, 300);
    assert!(output.join(INDEX_FILE).exists() && !output.join(WEIGHTS_FILE).exists());
    let written = Checkpoint::open(&output).unwrap();
    let Some(Quantization::CompressedTensors(config)) = written.quantization() else {
        panic!("another format");
    };
    let groups = config.groups();
    assert_eq!(groups[0].targets, ["Linear"]);
    assert_eq!(groups[1].targets, ["re:.*layers\\.0\\.mlp\\.down_proj$"]);
    assert_eq!(verify(&written).unwrap().n_quantized, 3);
}

#[test]
fn ignore_patterns_match_under_every_loader_s_names_and_spare_the_quantized() {
    let dir = source(&[Q_PROJ, DOWN_PROJ, "model.layers.3.mlp.up_proj"]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let plan = plan(&[
        (Q_PROJ, scheme(4, None, true)),
        (DOWN_PROJ, scheme(4, None, true)),
    ]);
    let schemes = plan.into_iter().map(|m| (m.name, m.scheme)).collect();
    let ignore = ignore_patterns(&checkpoint, &schemes).unwrap();
    let entries: Vec<Ignore> = ignore.iter().map(|e| Ignore::new(e)).collect();
    let is_ignored = |name: &str| entries.iter().any(|e| e.matches(name));
    for name in [
        "lm_head",
        "language_model.lm_head",
        "visual.blocks.0.attn.qkv",
        "model.visual.blocks.0.attn.qkv",
        "model.visual.merger.mlp.0",
        "model.layers.3.mlp.up_proj",
        "model.language_model.layers.3.mlp.up_proj",
        "language_model.model.layers.3.mlp.up_proj",
    ] {
        assert!(is_ignored(name), "{name} in {ignore:?}");
    }
    for name in [
        Q_PROJ,
        "model.language_model.layers.0.self_attn.q_proj",
        "language_model.model.layers.0.mlp.down_proj",
        "language_model.model.layers.13.mlp.up_proj",
    ] {
        assert!(!is_ignored(name), "{name} in {ignore:?}");
    }
}

#[test]
fn names_are_cut_where_loaders_agree() {
    assert_eq!(
        stable_part("model.layers.3.mlp.up_proj"),
        "layers.3.mlp.up_proj"
    );
    assert_eq!(stable_part("lm_head"), "lm_head");
    assert_eq!(stable_part("a.proj"), "proj");
    assert_eq!(stable_part("3.proj"), "3.proj");
    let free = |name, quantized: &str| {
        let schemes = [(quantized.to_owned(), scheme(4, None, true))].into();
        topmost_free(name, &schemes).map(str::to_owned)
    };
    assert_eq!(
        free("visual.blocks.0.qkv", Q_PROJ).as_deref(),
        Some("visual")
    );
    assert_eq!(
        free("model.vision_tower.a.b", Q_PROJ).as_deref(),
        Some("vision_tower")
    );
    assert_eq!(free("model.layers.3.mlp.up_proj", Q_PROJ), None);
    assert_eq!(free("lm_head", Q_PROJ), None);
}

#[test]
fn a_bad_plan_leaves_nothing_behind() {
    let dir = source(&[Q_PROJ, "lm_head"]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let home = tempfile::tempdir().unwrap();
    let good = scheme(4, Some(16), true);
    let cases = [
        (plan(&[("absent", good)]), "missing tensor absent.weight"),
        (
            plan(&[(Q_PROJ, scheme(4, Some(24), true))]),
            "which it does not divide",
        ),
        (plan(&[(Q_PROJ, good), (Q_PROJ, good)]), "planned twice"),
        (plan(&[("model.norm", good)]), "shape [4]"),
        (plan(&[("lm_head", good)]), "output head"),
        (plan(&[]), "no module given"),
    ];
    for (plan, expected) in cases {
        let error = create(&checkpoint, &plan, &home.path().join("out"))
            .err()
            .unwrap();
        assert!(error.to_string().contains(expected), "{error}");
    }
    let taken = create(&checkpoint, &plan(&[(Q_PROJ, good)]), home.path()).err();
    assert!(matches!(taken, Some(Error::Exists { .. })));
    let output = home.path().join("out");
    let exporter = create(&checkpoint, &plan(&[(Q_PROJ, good)]), &output).unwrap();
    let error = exporter.finish().unwrap_err().to_string();
    assert!(
        error.contains("missing data of tensor model.layers.0"),
        "{error}"
    );
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
}

#[test]
fn a_module_that_the_format_cannot_hold_is_refused() {
    let dir = source(&[Q_PROJ]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let home = tempfile::tempdir().unwrap();
    let bf16 = Scheme::new(3, Some(16), true, ScaleDtype::Bf16).unwrap();
    let plan = plan(&[(Q_PROJ, bf16)]);
    let mut exporter = create(&checkpoint, &plan, &home.path().join("out")).unwrap();
    let mut refused = |name: &str, weight: QuantizedWeight, expected: &str| {
        let error = exporter.write_module(name, &weight).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    };
    refused("other", weight(bf16, 12, 0), "missing module other");
    refused(Q_PROJ, weight(scheme(4, None, true), 12, 0), "planned");
    refused(
        Q_PROJ,
        weight(bf16, 11, 0),
        "expected shape [12, 32], found [11, 32]",
    );
}

/// Replaces the bytes of one tensor in a folder of one file.
fn overwrite(dir: &Path, name: &str, edit: impl FnOnce(&mut [u8])) {
    let path = dir.join(WEIGHTS_FILE);
    let mut bytes = fs::read(&path).unwrap();
    let (n_header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let (start, end) = metadata.info(name).unwrap().data_offsets;
    edit(&mut bytes[8 + n_header + start..8 + n_header + end]);
    fs::write(&path, bytes).unwrap();
}

#[test]
fn damage_in_a_written_folder_is_found() {
    let dir = tempfile::tempdir().unwrap();
    type Edit = fn(&mut [u8]);
    let cases: [(&str, Edit, &str); 5] = [
        (
            "weight_shape",
            |b| b[0] = 13,
            "expected shape [13, 3], found [12, 3]",
        ),
        ("weight_shape", |b| b[15] = 0x7f, "expected shape"),
        ("weight_shape", |b| b[15] = 0xff, "expected two positive"),
        ("weight_zero_point", |b| b[15] = 0x80, "spare bits"),
        ("weight_scale", |b| b[..4].fill(0xff), "NaN or infinite"),
    ];
    for (i, (suffix, edit, expected)) in cases.into_iter().enumerate() {
        let output = dir.path().join(i.to_string());
        export(
            &[(Q_PROJ, scheme(3, Some(16), false))],
            &output,
            MAX_SHARD_BYTES,
        );
        overwrite(&output, &format!("{Q_PROJ}.{suffix}"), edit);
        let error = verify(&Checkpoint::open(&output).unwrap())
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_changed_copy_and_a_changed_code_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("out");
    let scheme = scheme(3, Some(16), true);
    export(&[(Q_PROJ, scheme)], &output, MAX_SHARD_BYTES);
    let original = source(&[Q_PROJ]);
    let original = Checkpoint::open(original.path()).unwrap();
    verify_against(&Checkpoint::open(&output).unwrap(), &original).unwrap();
    overwrite(&output, &format!("{Q_PROJ}.weight_packed"), |b| b[0] ^= 1);
    let written = Checkpoint::open(&output).unwrap();
    let expected = weight(scheme, 12, 0).dequantize();
    let error = verify_module(&written, Q_PROJ, &expected)
        .unwrap_err()
        .to_string();
    assert!(error.contains("weight (0, 0): expected"), "{error}");
    overwrite(&output, "model.norm.weight", |b| b[1] ^= 1);
    let written = Checkpoint::open(&output).unwrap();
    let error = verify_against(&written, &original).unwrap_err().to_string();
    assert!(
        error.contains("tensor model.norm.weight: its bytes differ"),
        "{error}"
    );
    assert!(verify(&original).is_err());
}

#[test]
fn a_quantized_source_is_not_quantized_again() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("out");
    export(&[(Q_PROJ, scheme(4, None, true))], &output, MAX_SHARD_BYTES);
    let written = Checkpoint::open(&output).unwrap();
    let plan = plan(&[(DOWN_PROJ, scheme(4, None, true))]);
    let error = create(&written, &plan, &dir.path().join("again"))
        .err()
        .unwrap();
    assert!(matches!(error, Error::Unsupported { .. }));
}

#[test]
fn a_null_entry_in_the_config_is_replaced() {
    let dir = source(&[Q_PROJ]);
    let text = "{\"quantization_config\": null, \"a\": 1}";
    fs::write(dir.path().join(CONFIG_FILE), text).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let value = json!({"format": "pack-quantized"});
    let key = "quantization_config";
    let entry = super::layout::ConfigEntry { key, value };
    let text = super::config::config_text(&checkpoint, Some(&entry)).unwrap();
    let config: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(config["a"], 1);
    assert_eq!(config["quantization_config"]["format"], "pack-quantized");
}

/// The values of a plain tensor of a folder.
fn plain(folder: &Path, name: &str) -> Vec<f32> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let dtype = checkpoint.info(name).unwrap().dtype;
    dtype
        .f32_from_bytes(&checkpoint.bytes(name).unwrap())
        .unwrap()
}

#[test]
fn plain_tensors_may_be_changed_and_nothing_else_of_them() {
    const NORM: &str = "model.norm.weight";
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("out");
    let original = source(&[Q_PROJ]);
    let original = Checkpoint::open(original.path()).unwrap();
    let scheme = scheme(3, Some(16), true);
    let mut exporter = create(&original, &plan(&[(Q_PROJ, scheme)]), &output).unwrap();
    exporter
        .write_module(Q_PROJ, &weight(scheme, 12, 0))
        .unwrap();
    let values = [0.5, -2.0, 0.0, 65536.0];
    let q_weight = format!("{Q_PROJ}.weight");
    let bad: [(&str, &[f32]); 6] = [
        (NORM, &[1.0; 5]),
        (NORM, &[1.0, 2.0, 3.0, f32::NAN]),
        (NORM, &[1.0, 2.0, 3.0, 1.001]),
        ("model.nowhere.weight", &values),
        (&q_weight, &[0.0; 12 * 32]),
        ("model.layers.0.self_attn.q_proj.weight_packed", &values),
    ];
    for (name, values) in bad {
        assert!(exporter.write_tensor(name, values).is_err(), "{name}");
    }
    exporter.write_tensor(NORM, &values).unwrap();
    assert!(exporter.write_tensor(NORM, &values).is_err());
    let exported = exporter.finish().unwrap();
    assert_eq!((exported.n_copied, exported.changed.len()), (4, 1));
    assert_eq!(plain(&output, NORM), values);
    let written = || Checkpoint::open(&output).unwrap();
    assert!(verify_against(&written(), &original).is_err());
    let bytes = written().bytes(NORM).unwrap();
    let changed = BTreeMap::from([(NORM.to_owned(), blake3::hash(&bytes))]);
    verify_changed(&written(), &original, &changed).unwrap();
    overwrite(&output, NORM, |b| b[1] ^= 1);
    let error = verify_changed(&written(), &original, &changed).unwrap_err();
    assert!(error.to_string().contains("changed to"), "{error}");
}
