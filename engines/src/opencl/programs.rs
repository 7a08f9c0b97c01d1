//! The kernels of a device, compiled on first use.

use super::coded::Coded;
use super::device::Division;
use super::fault::fault;
use super::tier::MatrixUnit;
use super::tiles::TileLayout;
use crate::engine::KvElement;
use crate::error::{DeviceFault, EngineError};
use opencl3::context::Context;
use opencl3::kernel::Kernel;
use opencl3::program::Program;
use std::collections::HashMap;

const FUNCTIONS: &str = include_str!("kernels/functions.cl");
const ROWS: &str = include_str!("kernels/rows.cl");
const PRODUCTS: &str = include_str!("kernels/products.cl");
const TILES: &str = include_str!("kernels/tiles.cl");
const TILE_EMBED: &str = include_str!("kernels/tile_embed.cl");
const MATRIX_NVIDIA: &str = include_str!("kernels/matrix_nvidia.cl");
const MATRIX_EMULATED: &str = include_str!("kernels/matrix_emulated.cl");
const ATTENTION: &str = include_str!("kernels/attention.cl");
const LIMITS: &str = include_str!("kernels/limits.cl");

/// The options of all programs. `functions.cl` turns contraction off, and without `-cl-denorms-are-zero` denormal
/// numbers are kept.
const OPTIONS: &str = "-cl-std=CL1.2";

/// A set of kernels that are compiled together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum KernelSet {
    Rows,
    /// Products with weights in rows, of this many rows of codes at a time.
    Products(Coded, usize),
    /// Products with weights in tiles.
    Tiles(TileProduct),
    Attention(KvElement),
    /// Measurements of the device.
    Limits,
}

/// A product with weights in tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct TileProduct {
    pub(super) coded: Coded,
    pub(super) unit: MatrixUnit,
    /// Rows of codes at a time.
    pub(super) rows: usize,
    /// Warps of a work-group.
    pub(super) warps: usize,
}

impl TileProduct {
    fn source(self) -> String {
        match self.unit {
            MatrixUnit::Nvidia => [MATRIX_NVIDIA, TILES, TILE_EMBED].concat(),
            MatrixUnit::Emulated => [MATRIX_EMULATED, TILES, TILE_EMBED].concat(),
        }
    }

    fn defines(self) -> String {
        let Self { coded, rows, warps, .. } = self;
        let layout = TileLayout::of(coded).defines();
        format!("-DROWS={rows} -DWARPS={warps} {layout} {}", coded.defines())
    }
}

/// The compiled kernels of a device.
#[derive(Debug)]
pub(super) struct Programs {
    device: String,
    division: Division,
    programs: HashMap<KernelSet, Program>,
    kernels: HashMap<(KernelSet, &'static str), Kernel>,
}

impl Programs {
    pub(super) fn new(device: String, division: Division) -> Self {
        Self { device, division, programs: HashMap::new(), kernels: HashMap::new() }
    }

    /// Returns a kernel, compiled if need be.
    pub(super) fn kernel(
        &mut self,
        context: &Context,
        set: KernelSet,
        name: &'static str,
    ) -> Result<&Kernel, EngineError> {
        if !self.kernels.contains_key(&(set, name)) {
            self.prepare(context, set)?;
            let kernel = Kernel::create(&self.programs[&set], name);
            let kernel = kernel.map_err(|error| fault(&self.device, name, error))?;
            self.kernels.insert((set, name), kernel);
        }
        Ok(&self.kernels[&(set, name)])
    }

    /// Compiles a set of kernels, if that is not done.
    pub(super) fn prepare(&mut self, context: &Context, set: KernelSet) -> Result<(), EngineError> {
        if !self.programs.contains_key(&set) {
            let program = self.build(context, set)?;
            self.programs.insert(set, program);
        }
        Ok(())
    }

    fn build(&self, context: &Context, set: KernelSet) -> Result<Program, EngineError> {
        let (source, defines) = match set {
            KernelSet::Rows => (ROWS.to_owned(), String::new()),
            KernelSet::Limits => (LIMITS.to_owned(), String::new()),
            KernelSet::Products(coded, tile) => (PRODUCTS.to_owned(), format!("-DTILE={tile} {}", coded.defines())),
            KernelSet::Tiles(product) => (product.source(), product.defines()),
            KernelSet::Attention(KvElement::F16) => (ATTENTION.to_owned(), "-DCACHE=16".to_owned()),
            KernelSet::Attention(KvElement::F32) => (ATTENTION.to_owned(), "-DCACHE=32".to_owned()),
            KernelSet::Attention(KvElement::Q8_0) => (ATTENTION.to_owned(), "-DCACHE=8".to_owned()),
        };
        let mut program = Program::create_from_source(context, &[FUNCTIONS, &source].concat())
            .map_err(|error| fault(&self.device, "reading kernels", error))?;
        let options = format!("{OPTIONS} {} {defines}", self.division.option());
        match program.build(context.devices(), &options) {
            Ok(()) => Ok(program),
            Err(error) => {
                let log = program.get_build_log(context.default_device()).unwrap_or_default();
                let what = format!("compiling {set:?}: {error}: {}", log.trim());
                Err(EngineError::Device { device: self.device.clone(), fault: DeviceFault::Compile, what })
            }
        }
    }
}

#[cfg(test)]
mod intel_gate;
