//! Every format: what it holds comes back bit for bit, what it cannot hold is refused with a reason.

use super::*;
use crate::checkpoint::DType;

const COLS: usize = 128;
const ROWS: usize = 32;
const GATE: &str = "model.layers.0.mlp.gate_proj";

/// A weight of numbers without pattern on a grid.
fn grid(scheme: Scheme, seed: u32) -> QuantizedWeight {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(77);
    let mut next = |n: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) % n
    };
    let n_groups = COLS / scheme.group_len("m", COLS).unwrap();
    let n_codes = u32::from(scheme.max_code()) + 1;
    let codes = (0..ROWS * COLS).map(|_| next(n_codes) as u8).collect();
    let middle = 1 << (scheme.bits() - 1);
    let zeros = (0..ROWS * n_groups)
        .map(|_| match scheme.symmetric() {
            true => middle,
            false => next(n_codes) as u8,
        })
        .collect();
    let scales = Matrix::from_fn(ROWS, n_groups, |_, _| {
        scheme
            .scale_dtype()
            .round(0.003 + next(1000) as f32 / 50_000.0)
    });
    QuantizedWeight::new("m", scheme, [ROWS, COLS], codes, scales, zeros).unwrap()
}

/// A source with `[32, 128]` weights for these modules beside a vision tower and an embedding.
fn wide_source(modules: &[&str]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(CONFIG_FILE), CONFIG).unwrap();
    fs::write(dir.path().join("preprocessor_config.json"), "{}").unwrap();
    let spec = |name: &str, shape: &[usize]| TensorSpec {
        name: name.to_owned(),
        dtype: DType::Bf16,
        shape: shape.to_vec(),
    };
    let mut specs = vec![
        spec("model.embed_tokens.weight", &[5, COLS]),
        spec("visual.blocks.0.mlp.gate_proj.weight", &[ROWS, COLS]),
        spec("model.norm.weight", &[COLS]),
    ];
    let weights = modules.iter().map(|m| format!("{m}.weight"));
    specs.extend(weights.map(|name| spec(&name, &[ROWS, COLS])));
    let mut writer = ShardedWriter::create(dir.path(), specs.clone(), MAX_SHARD_BYTES).unwrap();
    for spec in specs {
        let n = spec.shape.iter().product::<usize>();
        let bytes: Vec<u8> = (0..n).flat_map(|i| [i as u8, 0x3c]).collect();
        writer.write(&spec.name, &bytes).unwrap();
    }
    writer.finish().unwrap();
    dir
}

/// Writes made-up weights in a format.
fn write(format: Format, modules: &[(&str, Scheme)], output: &Path) -> Result<Exported> {
    let names: Vec<&str> = modules.iter().map(|(name, _)| *name).collect();
    let dir = wide_source(&names);
    let source = Checkpoint::open(dir.path())?;
    let pending = PendingFolder::create(output)?;
    let plan = plan(modules);
    format.check(&source, &plan)?;
    let mut exporter = Exporter::create(&source, format, &plan, pending, MAX_SHARD_BYTES)?;
    for (seed, (name, scheme)) in modules.iter().enumerate() {
        exporter.write_module(name, &grid(*scheme, seed as u32))?;
    }
    exporter.finish()
}

fn in_format(source: &Checkpoint, format: Format, output: &Path) -> Result<Exported> {
    convert(source, format, &plan_of(source)?, output, &[])
}

fn of(bits: u8, group_size: Option<usize>, symmetric: bool) -> Scheme {
    Scheme::new(bits, group_size, symmetric, ScaleDtype::Bf16).unwrap()
}

/// What a format makes of a scheme when it is read back.
fn as_read(format: Format, scheme: Scheme) -> Scheme {
    let scheme = scheme.with_scale_dtype(format.scale_dtype(scheme.scale_dtype()));
    let always_asymmetric = matches!(format, Format::Awq | Format::Mlx);
    match always_asymmetric {
        true => {
            let (bits, size) = (scheme.bits(), scheme.group_size());
            Scheme::new(bits, size, false, scheme.scale_dtype()).unwrap()
        }
        false => scheme,
    }
}

fn same_weight(found: &QuantizedWeight, expected: &QuantizedWeight) {
    assert_eq!(found.codes(), expected.codes());
    assert_eq!(found.zero_points(), expected.zero_points());
    assert_eq!(found.scales(), expected.scales());
}

/// Through every format that holds a scheme and back to the first: nothing changes on the way.
#[test]
fn codes_survive_every_format_and_the_way_back() {
    let home = tempfile::tempdir().unwrap();
    let mut n = 0;
    for bits in Scheme::BITS {
        for (size, symmetric) in [(Some(32), true), (Some(64), false), (None, false)] {
            let scheme = of(bits, size, symmetric);
            let first = home.path().join(format!("{bits}-{size:?}-{symmetric}"));
            let modules = [(Q_PROJ, scheme), (GATE, scheme)];
            write(Format::CompressedTensors, &modules, &first).unwrap();
            for (name, format) in Format::NAMES {
                if format == Format::Gguf {
                    let error = in_format(&Checkpoint::open(&first).unwrap(), format, &first);
                    assert!(error.is_err());
                    continue;
                }
                let output = first.with_extension(name);
                let result = in_format(&Checkpoint::open(&first).unwrap(), format, &output);
                let fits = match format {
                    Format::Awq => bits == 4,
                    Format::Mlx => size.is_some() && (bits < 8 || symmetric),
                    _ => true,
                };
                assert_eq!(result.is_ok(), fits, "{name} {scheme:?}: {result:?}");
                assert_eq!(output.exists(), fits);
                let Ok(exported) = result else { continue };
                assert_eq!(exported.rounded_scales, RoundedScales::default());
                check_converted(format, &output, scheme);
                n += 1;
            }
        }
    }
    assert_eq!(n, 4 * 3 * 5 + 3 + 7);
}

fn check_converted(format: Format, output: &Path, scheme: Scheme) {
    let written = Checkpoint::open(output).unwrap();
    let expected = grid(scheme, 1);
    if let Format::Dense(dtype) = format {
        let found = written.linear_weight(GATE, ROWS, COLS).unwrap();
        let values = expected.dequantize();
        let rounded: Vec<f32> = values.data().iter().map(|v| dtype.round(*v)).collect();
        assert_eq!(found.data(), rounded);
        assert!(written.quantization().is_none());
        assert_eq!(written.config_text().trim_end(), CONFIG.trim_end());
        return;
    }
    verify(&written).unwrap();
    let found = written.packed_module(GATE).unwrap();
    same_weight(&found, &expected);
    assert_eq!(found.scheme(), as_read(format, scheme));
    let back = output.with_extension(format!("{}-back", format.name()));
    in_format(&written, Format::CompressedTensors, &back).unwrap();
    let again = Checkpoint::open(&back).unwrap();
    same_weight(&again.packed_module(Q_PROJ).unwrap(), &grid(scheme, 0));
}

#[test]
fn gptq_says_which_version_and_which_modules() {
    let home = tempfile::tempdir().unwrap();
    let output = home.path().join("gptq");
    let modules = [
        (Q_PROJ, of(3, Some(64), true)),
        (GATE, of(3, Some(64), true)),
    ];
    write(Format::Gptq, &modules, &output).unwrap();
    let text = fs::read_to_string(output.join("quantize_config.json")).unwrap();
    let beside: Value = serde_json::from_str(&text).unwrap();
    let written = Checkpoint::open(&output).unwrap();
    let config = &written.config()["quantization_config"];
    assert_eq!(&beside, config);
    let expected = [
        ("bits", json!(3)),
        ("group_size", json!(64)),
        ("sym", json!(true)),
        ("desc_act", json!(false)),
        ("checkpoint_format", json!("gptq")),
        (
            "block_name_to_quantize",
            json!("model.language_model.layers"),
        ),
        ("modules_in_block_to_quantize", Value::Null),
    ];
    for (key, value) in expected {
        assert_eq!(config.get(key).unwrap_or(&Value::Null), &value, "{key}");
    }
    assert_eq!(config["dynamic"]["-:.*visual.*"], json!({}));
    assert_eq!(config["dynamic"]["-:.*lm_head$"], json!({}));
    let shape = |suffix: &str| {
        let info = written.info(&format!("{GATE}.{suffix}")).unwrap();
        (info.dtype, info.shape.clone())
    };
    assert_eq!(shape("qweight"), (DType::I32, vec![12, 32]));
    assert_eq!(shape("qzeros"), (DType::I32, vec![2, 3]));
    assert_eq!(shape("scales"), (DType::F16, vec![2, 32]));
    assert_eq!(shape("g_idx"), (DType::I32, vec![128]));
    // v1 keeps the zero point 4 as 3: 011011… from the lowest bit.
    let zeros = written.bytes(&format!("{GATE}.qzeros")).unwrap();
    assert_eq!(zeros[..4], 0o33_333_333_333u64.to_le_bytes()[..4]);
}

#[test]
fn mixed_formats_are_named_module_by_module() {
    let home = tempfile::tempdir().unwrap();
    let up = "model.layers.0.mlp.up_proj";
    let modules = [
        (Q_PROJ, of(4, Some(64), true)),
        (GATE, of(4, Some(64), true)),
        (up, of(2, Some(64), false)),
    ];
    let gptq = home.path().join("gptq");
    write(Format::Gptq, &modules, &gptq).unwrap();
    let written = Checkpoint::open(&gptq).unwrap();
    let config = &written.config()["quantization_config"];
    assert_eq!(config["checkpoint_format"], "gptq_v2");
    let expected = json!({"bits": 2, "group_size": 64, "sym": false});
    assert_eq!(
        config["dynamic"]["+:.*layers\\.0\\.mlp\\.up_proj$"],
        expected
    );
    same_weight(&written.packed_module(up).unwrap(), &grid(modules[2].1, 2));
    same_weight(
        &written.packed_module(GATE).unwrap(),
        &grid(modules[1].1, 1),
    );
    let alike = [
        (Q_PROJ, of(4, Some(64), true)),
        ("model.layers.1.self_attn.q_proj", of(4, Some(64), true)),
        ("model.layers.2.self_attn.q_proj", of(4, Some(64), true)),
        (GATE, of(2, Some(64), true)),
        (up, of(2, Some(64), true)),
    ];
    let one = home.path().join("alike");
    write(Format::Gptq, &alike, &one).unwrap();
    let written = Checkpoint::open(&one).unwrap();
    let rules = &written.config()["quantization_config"]["dynamic"];
    let rule = "+:.*layers\\.0\\.mlp\\.(gate_up_proj|gate_proj|up_proj)$";
    assert_eq!(rules[rule]["bits"], 2);
    let mlx = home.path().join("mlx");
    write(Format::Mlx, &modules, &mlx).unwrap();
    let written = Checkpoint::open(&mlx).unwrap();
    assert_eq!(written.config()["quantization"][up]["bits"], 2);
    same_weight(&written.packed_module(up).unwrap(), &grid(modules[2].1, 2));
    let awq = write(Format::Awq, &modules, &home.path().join("awq"));
    let error = awq.unwrap_err().to_string();
    assert!(error.contains("2 bits, of which it has 4 only"), "{error}");
}

#[test]
fn modules_without_codes_are_told_to_gptq_and_awq() {
    let home = tempfile::tempdir().unwrap();
    let names = [Q_PROJ, GATE, "model.layers.0.mlp.up_proj"];
    let dir = wide_source(&names);
    let source = Checkpoint::open(dir.path()).unwrap();
    let scheme = of(4, Some(64), true);
    let plan = plan(&[(Q_PROJ, scheme)]);
    for (format, key, expected) in [
        (
            Format::Gptq,
            "modules_in_block_to_quantize",
            json!([["self_attn.q_proj"]]),
        ),
        (
            Format::Awq,
            "modules_to_not_convert",
            json!([
                "embed_tokens",
                "lm_head",
                "mlp",
                "visual",
                ".*embed_tokens",
                ".*lm_head",
                ".*mlp",
                ".*visual"
            ]),
        ),
    ] {
        let output = home.path().join(format.name());
        let pending = PendingFolder::create(&output).unwrap();
        let mut exporter =
            Exporter::create(&source, format, &plan, pending, MAX_SHARD_BYTES).unwrap();
        exporter.write_module(Q_PROJ, &grid(scheme, 0)).unwrap();
        exporter.finish().unwrap();
        let written = Checkpoint::open(&output).unwrap();
        assert_eq!(written.config()["quantization_config"][key], expected);
    }
}

#[test]
fn what_a_format_cannot_hold_is_refused_with_the_reason() {
    let home = tempfile::tempdir().unwrap();
    let cases = [
        (Format::Mlx, of(4, Some(16), true), "groups of 16"),
        (Format::Awq, of(8, Some(32), true), "8 bits"),
        (Format::Mlx, of(4, None, true), "per channel"),
    ];
    for (format, scheme, expected) in cases {
        let output = home.path().join("out");
        let error = write(format, &[(GATE, scheme)], &output).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(expected) && text.contains(GATE), "{text}");
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
    }
    let plain = wide_source(&[GATE]);
    let source = Checkpoint::open(plain.path()).unwrap();
    let error = in_format(&source, Format::Gptq, &home.path().join("out")).unwrap_err();
    assert!(error.to_string().contains("not quantized"), "{error}");
}

/// GPTQ as other tools write it: groups made in the order of activations.
#[test]
fn scattered_groups_are_read_as_numbers() {
    let home = tempfile::tempdir().unwrap();
    let output = home.path().join("gptq");
    let scheme = of(4, Some(64), true);
    write(Format::Gptq, &[(GATE, scheme)], &output).unwrap();
    let g_idx: Vec<u8> = (0..COLS as u32)
        .flat_map(|i| (i % 2).to_le_bytes())
        .collect();
    overwrite(&output, &format!("{GATE}.g_idx"), |b| {
        b.copy_from_slice(&g_idx)
    });
    let written = Checkpoint::open(&output).unwrap();
    assert!(matches!(
        written.quantization(),
        Some(Quantization::Gptq(_))
    ));
    let found = written.linear_weight(GATE, ROWS, COLS).unwrap();
    let weight = grid(scheme, 0);
    for row in 0..ROWS {
        for col in 0..COLS {
            let code = f32::from(weight.codes()[row * COLS + col]) - 8.0;
            assert_eq!(
                found.row(row)[col],
                code * weight.scales().row(row)[col % 2]
            );
        }
    }
    let error = written.packed_module(GATE).unwrap_err().to_string();
    assert!(error.contains("desc_act"), "{error}");
    overwrite(&output, &format!("{GATE}.g_idx"), |b| b[0] = 1);
    let error = Checkpoint::open(&output).unwrap().packed_module(GATE);
    assert!(
        error
            .unwrap_err()
            .to_string()
            .contains("2 groups of one size")
    );
}
