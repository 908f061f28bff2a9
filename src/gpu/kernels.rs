//! The kernels of `cuda/kernels`, each as a function that checks its arrays. What they do is told
//! there.

use super::Argument::{Double, Float, Int, Size};
use super::array::{Array, Place};
use super::{Argument, Gpu};
use crate::Result;

/// The source of all of them, compiled as one.
#[cfg(any(feature = "cuda", test))]
pub(super) const SOURCE: &str = concat!(
    include_str!("../../cuda/kernels/number.cu"),
    include_str!("../../cuda/kernels/moments.cu"),
    include_str!("../../cuda/kernels/factor.cu"),
    include_str!("../../cuda/kernels/column_block.cu"),
    include_str!("../../cuda/kernels/grid.cu"),
);

/// All of them by name.
#[cfg(any(feature = "cuda", test))]
pub(super) const NAMES: [&str; 15] = [
    "weigh_rows",
    "count_not_finite",
    "clear_upper",
    "diagonal",
    "fill_reversed",
    "unit_upper",
    "order_square",
    "order_columns",
    "restore_columns",
    "divide_columns",
    "add_rows",
    "row_dots",
    "rounding_errors",
    "solve_block",
    "fit_grids",
];

/// Columns that [`solve_block`] takes at most.
pub(super) const BLOCK_COLS: usize = 128;

const LANES: usize = 32;

/// Threads of a block. Few, so that the rows of a narrow matrix spread over the chip.
const THREADS: usize = 128;

/// Blocks that elements are shared out to at most: enough to fill any chip.
const MOST_BLOCKS: usize = 4096;

fn of<T: super::array::Number>(array: &Array<T>) -> Argument {
    Argument::Place(Some(array.place()))
}

fn of_some<T: super::array::Number>(array: Option<&Array<T>>) -> Argument {
    Argument::Place(array.map(Array::place))
}

/// Launches with threads for `n` elements, of which each takes several where there are many.
///
/// # Safety
/// As [`Gpu::launch`].
unsafe fn by_element(
    gpu: &dyn Gpu,
    kernel: &'static str,
    n: usize,
    arguments: &[Argument],
) -> Result<()> {
    if n == 0 {
        return Ok(());
    }
    let n_blocks = n.div_ceil(THREADS).min(MOST_BLOCKS) as u32;
    // SAFETY: the caller answers for the arguments.
    unsafe { gpu.launch(kernel, n_blocks, THREADS as u32, arguments) }
}

/// Launches with a warp for each of `n` tasks.
///
/// # Safety
/// As [`Gpu::launch`].
unsafe fn by_warp(
    gpu: &dyn Gpu,
    kernel: &'static str,
    n: usize,
    arguments: &[Argument],
) -> Result<()> {
    if n == 0 {
        return Ok(());
    }
    let n_blocks = n.div_ceil(THREADS / LANES);
    let n_blocks = u32::try_from(n_blocks).expect("fewer rows and groups than addresses");
    // SAFETY: the caller answers for the arguments.
    unsafe { gpu.launch(kernel, n_blocks, THREADS as u32, arguments) }
}

/// What tokens weighted by root make of x, or of x − minus, `[rows, cols]`, at `out`.
///
/// # Errors
/// [`crate::Error::Device`].
pub(super) fn weigh_rows(
    gpu: &dyn Gpu,
    out: Weighed<'_>,
    [x, minus]: [Option<Place>; 2],
    roots: Option<&Array<f32>>,
    [rows, cols]: [usize; 2],
) -> Result<()> {
    let (out, as_bf16) = match out {
        Weighed::F32(out) => {
            assert!(
                out.len() >= rows * cols,
                "there is room for what is weighed"
            );
            (of(out), 0)
        }
        Weighed::Bf16(out) => {
            assert!(
                out.len() >= rows * cols,
                "there is room for what is weighed"
            );
            (of(out), 1)
        }
    };
    assert!(
        roots.is_none_or(|roots| roots.len() == rows),
        "each row has a weight"
    );
    let arguments = [
        out,
        Argument::Place(x),
        Argument::Place(minus),
        of_some(roots),
        Size(rows),
        Size(cols),
        Int(as_bf16),
    ];
    // SAFETY: those of weigh_rows; tensors lie where they are said to.
    unsafe { by_element(gpu, "weigh_rows", rows * cols, &arguments) }
}

/// Where [`weigh_rows`] writes to.
pub(super) enum Weighed<'a> {
    F32(&'a mut Array<f32>),
    Bf16(&'a mut Array<u16>),
}

/// Adds to `count` how many of the `n` numbers at `x` are NaN or infinite.
///
/// # Errors
/// [`crate::Error::Device`].
pub(super) fn count_not_finite(
    gpu: &dyn Gpu,
    count: &mut Array<u32>,
    x: Place,
    n: usize,
) -> Result<()> {
    let arguments = [of(count), Argument::Place(Some(x)), Size(n)];
    // SAFETY: those of count_not_finite; the tensor lies where it is said to.
    unsafe { by_element(gpu, "count_not_finite", n, &arguments) }
}

/// What lies above the diagonal of `square [n, n]` becomes zero.
///
/// # Errors
/// [`crate::Error::Device`].
pub(super) fn clear_upper(gpu: &dyn Gpu, square: &mut Array<f32>, n: usize) -> Result<()> {
    assert!(square.len() == n * n, "a square");
    // SAFETY: those of clear_upper.
    unsafe { by_element(gpu, "clear_upper", n * n, &[of(square), Size(n)]) }
}

/// The diagonal of `square [n, n]`.
///
/// # Errors
/// [`crate::Error::Device`].
pub(super) fn diagonal(
    gpu: &std::sync::Arc<dyn Gpu>,
    square: &Array<f32>,
    n: usize,
) -> Result<Vec<f32>> {
    assert!(square.len() == n * n, "a square");
    let out = Array::zeros(gpu, n)?;
    // SAFETY: those of diagonal.
    unsafe { by_element(&**gpu, "diagonal", n, &[of(&out), of(square), Size(n)])? };
    out.values()
}

/// What is decided about the columns of H.
pub(super) struct Ordered<'a> {
    pub(super) order: &'a Array<i32>,
    /// By original column.
    pub(super) is_dead: &'a Array<u8>,
    pub(super) mean: f64,
}

/// H damped, in reversed solving order and in units of its mean, below the diagonal of `out`.
///
/// # Errors
/// [`crate::Error::Device`].
pub(super) fn fill_reversed(
    gpu: &dyn Gpu,
    out: &mut Array<f32>,
    hessian: &Array<f32>,
    ordered: &Ordered<'_>,
    damping: f64,
) -> Result<()> {
    let n = ordered.order.len();
    let fits = out.len() == n * n && hessian.len() == n * n && ordered.is_dead.len() == n;
    assert!(fits, "squares of as many columns");
    let arguments = [
        of(out),
        of(hessian),
        of(ordered.order),
        of(ordered.is_dead),
        Size(n),
        Double(ordered.mean),
        Double(damping),
    ];
    // SAFETY: those of fill_reversed.
    unsafe { by_element(gpu, "fill_reversed", n * n, &arguments) }
}

/// R in `out` from the factor of the reversed matrix, both `[n, n]`.
///
/// # Errors
/// [`crate::Error::Device`].
pub(super) fn unit_upper(
    gpu: &dyn Gpu,
    out: &mut Array<f32>,
    lower: &Array<f32>,
    n: usize,
) -> Result<()> {
    assert!(out.len() == n * n && lower.len() == n * n, "squares");
    // SAFETY: those of unit_upper.
    unsafe { by_element(gpu, "unit_upper", n * n, &[of(out), of(lower), Size(n)]) }
}

/// Rows and columns of `square [n, n]` in solving order, divided by `mean`.
///
/// # Errors
/// [`crate::Error::Device`].
pub(super) fn order_square(
    gpu: &dyn Gpu,
    out: &mut Array<f32>,
    square: &Array<f32>,
    order: &Array<i32>,
    mean: f64,
) -> Result<()> {
    let n = order.len();
    assert!(out.len() == n * n && square.len() == n * n, "squares");
    let arguments = [of(out), of(square), of(order), Size(n), Double(mean)];
    // SAFETY: those of order_square.
    unsafe { by_element(gpu, "order_square", n * n, &arguments) }
}

/// The columns `order` of `x [rows, n]`, times `factor`.
///
/// # Errors
/// [`crate::Error::Device`].
pub(super) fn order_columns(
    gpu: &dyn Gpu,
    out: &mut Array<f32>,
    x: &Array<f32>,
    order: &Array<i32>,
    [rows, n]: [usize; 2],
    factor: f64,
) -> Result<()> {
    let n_out = order.len();
    assert!(
        out.len() >= rows * n_out && x.len() >= rows * n,
        "rows of columns"
    );
    let shape = [Size(rows), Size(n_out), Size(n)];
    let arguments = [
        of(out),
        of(x),
        of(order),
        shape[0],
        shape[1],
        shape[2],
        Double(factor),
    ];
    // SAFETY: those of order_columns; the order is of columns that there are.
    unsafe { by_element(gpu, "order_columns", rows * n_out, &arguments) }
}

/// Columns of `x [rows, n]` back in their original order.
///
/// # Errors
/// [`crate::Error::Device`].
pub(super) fn restore_columns(
    gpu: &dyn Gpu,
    out: &mut Array<f32>,
    x: &Array<f32>,
    order: &Array<i32>,
    rows: usize,
) -> Result<()> {
    let n = order.len();
    assert!(
        out.len() >= rows * n && x.len() >= rows * n,
        "rows of columns"
    );
    let arguments = [of(out), of(x), of(order), Size(rows), Size(n)];
    // SAFETY: those of restore_columns; the order is of columns that there are.
    unsafe { by_element(gpu, "restore_columns", rows * n, &arguments) }
}

/// Columns of `x [rows, n]` divided by D; of a square, what is not above its diagonal becomes zero.
///
/// # Errors
/// [`crate::Error::Device`].
pub(super) fn divide_columns(
    gpu: &dyn Gpu,
    x: &mut Array<f32>,
    pivots: &Array<f32>,
    rows: usize,
    is_strictly_upper: bool,
) -> Result<()> {
    let n = pivots.len();
    assert!(x.len() >= rows * n, "rows of columns");
    let is_strictly_upper = Int(i32::from(is_strictly_upper));
    let arguments = [
        of(x),
        of(pivots),
        Size(rows),
        Size(n),
        Size(0),
        is_strictly_upper,
    ];
    // SAFETY: those of divide_columns.
    unsafe { by_element(gpu, "divide_columns", rows * n, &arguments) }
}

/// w + α x, α by row; all `[rows, n]`.
///
/// # Errors
/// [`crate::Error::Device`].
pub(super) fn add_rows(
    gpu: &dyn Gpu,
    out: &mut Array<f32>,
    w: &Array<f32>,
    x: &Array<f32>,
    alphas: &Array<f32>,
    n: usize,
) -> Result<()> {
    let rows = alphas.len();
    let fits = [out.len(), w.len(), x.len()]
        .iter()
        .all(|len| *len >= rows * n);
    assert!(fits, "rows of columns");
    let arguments = [of(out), of(w), of(x), of(alphas), Size(rows), Size(n)];
    // SAFETY: those of add_rows.
    unsafe { by_element(gpu, "add_rows", rows * n, &arguments) }
}

/// ⟨a, b⟩ of each row, both `[rows, n]`.
///
/// # Errors
/// [`crate::Error::Device`].
pub(super) fn row_dots(
    gpu: &std::sync::Arc<dyn Gpu>,
    a: &Array<f32>,
    b: &Array<f32>,
    [rows, n]: [usize; 2],
) -> Result<Vec<f64>> {
    assert!(
        a.len() >= rows * n && b.len() >= rows * n,
        "rows of columns"
    );
    let out = Array::zeros(gpu, rows)?;
    let arguments = [of(&out), of(a), of(b), Size(rows), Size(n)];
    // SAFETY: those of row_dots.
    unsafe { by_warp(&**gpu, "row_dots", rows, &arguments)? };
    out.values()
}

/// Scales and zero points `[rows, n_groups]`.
pub(super) struct GridArrays {
    pub(super) scales: Array<f32>,
    pub(super) zeros: Array<f32>,
}

/// What codes leave of w, all `[rows, n]`.
///
/// # Errors
/// [`crate::Error::Device`].
pub(super) fn rounding_errors(
    gpu: &dyn Gpu,
    out: &mut Array<f32>,
    w: &Array<f32>,
    codes: &Array<u8>,
    grids: &GridArrays,
    [rows, n, group_len]: [usize; 3],
) -> Result<()> {
    let fits = [out.len(), w.len(), codes.len()]
        .iter()
        .all(|len| *len >= rows * n);
    let n_groups = n / group_len;
    let grids_fit = grids.scales.len() >= rows * n_groups && grids.zeros.len() >= rows * n_groups;
    assert!(fits && grids_fit, "rows of columns and groups");
    let shape = [Size(rows), Size(n), Size(group_len)];
    let arguments = [
        of(out),
        of(w),
        of(codes),
        of(&grids.scales),
        of(&grids.zeros),
        shape[0],
        shape[1],
        shape[2],
    ];
    // SAFETY: those of rounding_errors.
    unsafe { by_element(gpu, "rounding_errors", rows * n, &arguments) }
}

/// How grids are fitted, in the kernel's numbers.
#[derive(Clone, Copy, Debug)]
pub(super) struct GridFormat {
    pub(super) max_code: f32,
    pub(super) is_symmetric: bool,
    pub(super) scale_type: i32,
    pub(super) clip: i32,
    pub(super) norm: i32,
}

/// Fits the grids of some groups of all rows.
///
/// Shapes: `weights [rows, n]`, `moved [rows, groups · group_len]`, `counts [n]`.
///
/// # Errors
/// [`crate::Error::Device`].
pub(super) fn fit_grids(
    gpu: &dyn Gpu,
    grids: &mut GridArrays,
    weights: &Array<f32>,
    [moved, counts]: [Option<&Array<f32>>; 2],
    [rows, n, group_len]: [usize; 3],
    groups: std::ops::Range<usize>,
    format: GridFormat,
) -> Result<()> {
    let n_groups = n / group_len;
    let grids_fit = grids.scales.len() >= rows * n_groups && grids.zeros.len() >= rows * n_groups;
    let fits = grids_fit && weights.len() >= rows * n && groups.end <= n_groups;
    let moved_fit = moved.is_none_or(|m| m.len() >= rows * groups.len() * group_len);
    assert!(
        fits && moved_fit && counts.is_none_or(|c| c.len() >= n),
        "rows of groups"
    );
    let arguments = [
        of(&grids.scales),
        of(&grids.zeros),
        of(weights),
        of_some(moved),
        of_some(counts),
        Size(rows),
        Size(n),
        Size(group_len),
        Size(groups.start),
        Size(groups.len()),
        Float(format.max_code),
        Int(i32::from(format.is_symmetric)),
        Int(format.scale_type),
        Int(format.clip),
        Int(format.norm),
    ];
    // SAFETY: those of fit_grids.
    unsafe { by_warp(gpu, "fit_grids", rows * groups.len(), &arguments) }
}

/// What [`solve_block`] works on. Shapes as in `cuda/kernels/column_block.cu`.
pub(super) struct Solving<'a> {
    pub(super) targets: &'a Array<f32>,
    pub(super) shifts: &'a Array<f32>,
    pub(super) unit_upper: &'a Array<f32>,
    pub(super) pull: Option<&'a Array<f32>>,
    pub(super) alpha: f32,
    pub(super) grids: &'a GridArrays,
    pub(super) first_values: Option<&'a Array<f32>>,
    pub(super) step_losses: &'a Array<f64>,
    pub(super) order: &'a Array<i32>,
    pub(super) rows: usize,
    pub(super) group_len: usize,
    pub(super) max_code: f32,
}

/// What [`solve_block`] leaves.
pub(super) struct Found {
    /// Of the present block, `[rows, width]`.
    pub(super) differences: Array<f32>,
    pub(super) values: Array<f32>,
    /// Of all, `[rows, n]` in original order.
    pub(super) codes: Array<u8>,
    /// By row.
    pub(super) losses: Array<f64>,
    pub(super) live_squares: Array<f64>,
    pub(super) n_bad: Array<u32>,
}

/// Rounds the columns of one block, at most [`BLOCK_COLS`].
///
/// # Errors
/// [`crate::Error::Device`].
pub(super) fn solve_block(
    gpu: &dyn Gpu,
    found: &mut Found,
    solving: &Solving<'_>,
    block: std::ops::Range<usize>,
) -> Result<()> {
    let (rows, n) = (solving.rows, solving.order.len());
    let squares = [Some(solving.unit_upper), solving.pull];
    let squares_fit = squares.iter().flatten().all(|square| square.len() >= n * n);
    let fits = solving.targets.len() >= rows * n
        && solving.shifts.len() >= rows * n
        && found.codes.len() >= rows * n
        && solving.step_losses.len() >= n
        && solving.first_values.is_none_or(|first| first.len() >= rows);
    let width = block.len();
    let buffers = [&found.differences, &found.values];
    let buffers_fit = buffers.iter().all(|buffer| buffer.len() >= rows * width);
    let is_block = block.end <= n && width <= BLOCK_COLS;
    assert!(
        squares_fit && fits && buffers_fit && is_block,
        "rows of columns"
    );
    let arguments = [
        of(&found.differences),
        of(&found.values),
        of(&found.codes),
        of(&found.losses),
        of(&found.live_squares),
        of(&found.n_bad),
        of(solving.targets),
        of(solving.shifts),
        of(solving.unit_upper),
        of_some(solving.pull),
        of(&solving.grids.scales),
        of(&solving.grids.zeros),
        of_some(solving.first_values),
        of(solving.step_losses),
        of(solving.order),
        Size(rows),
        Size(n),
        Size(block.start),
        Int(width as i32),
        Size(solving.group_len),
        Float(solving.max_code),
        Float(solving.alpha),
    ];
    // SAFETY: those of solve_block.
    unsafe { by_warp(gpu, "solve_block", rows, &arguments) }
}
