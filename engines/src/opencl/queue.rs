//! A device's queue: kernels are compiled on first use and run in order; nothing spins while it waits.

use super::device::{Division, Found};
use super::fault::fault;
use super::weights::Coded;
use crate::engine::KvElement;
use crate::error::{DeviceFault, EngineError};
use opencl3::command_queue::CommandQueue;
use opencl3::context::Context;
use opencl3::error_codes::ClError;
use opencl3::event::{CL_COMPLETE, Event};
use opencl3::kernel::Kernel;
use opencl3::memory::{Buffer, CL_MEM_READ_WRITE, ClMem};
use opencl3::program::Program;
use opencl3::types::{CL_NON_BLOCKING, cl_mem};
use std::collections::HashMap;
use std::ffi::c_void;
use std::time::Duration;

/// Lanes of the work-groups of all kernels: `LANES` in `functions.cl`.
pub(super) const LANES: usize = 64;

/// The shortest and the longest sleep between two looks whether work is done.
const SLEEPS: (Duration, Duration) = (Duration::from_micros(20), Duration::from_micros(500));

const FUNCTIONS: &str = include_str!("kernels/functions.cl");
const ROWS: &str = include_str!("kernels/rows.cl");
const PRODUCTS: &str = include_str!("kernels/products.cl");
const ATTENTION: &str = include_str!("kernels/attention.cl");

const OPTIONS: &str = "-cl-std=CL1.2";

/// A set of kernels that are compiled together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum KernelSet {
    Rows,
    /// Products with weights of a coding, of this many rows at a time.
    Products(Coded, usize),
    Attention(KvElement),
}

/// An argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub(super) enum Arg {
    Memory(cl_mem),
    Int(i32),
    Unsigned(u32),
    Long(u64),
    Float(f32),
    /// Local memory of so many bytes.
    Local(usize),
}

/// The queue of one device, with its compiled kernels.
#[derive(Debug)]
pub(super) struct Queue {
    device: String,
    context: Context,
    queue: CommandQueue,
    kernels: HashMap<(KernelSet, &'static str), Kernel>,
    programs: HashMap<KernelSet, Program>,
    division: Division,
    /// The largest buffer that the device allocates, in bytes.
    buffer_max_bytes: u64,
}

impl Queue {
    pub(super) fn new(found: &Found) -> Result<Self, EngineError> {
        let id = found.report.id.0.clone();
        let context = Context::from_device(&found.device).map_err(|error| fault(&id, "creating a context", error))?;
        // SAFETY: the queue has no properties, so it runs in order.
        let queue = unsafe { CommandQueue::create(&context, found.device.id(), 0) };
        let queue = queue.map_err(|error| fault(&id, "creating a queue", error))?;
        let buffer_max_bytes =
            found.device.max_mem_alloc_size().map_err(|error| fault(&id, "asking for its largest buffer", error))?;
        let (kernels, programs) = (HashMap::new(), HashMap::new());
        let division = Division::of(found)?;
        Ok(Self { device: id, context, queue, kernels, programs, division, buffer_max_bytes })
    }

    /// The id of the device.
    pub(super) fn device(&self) -> &str {
        &self.device
    }

    fn fault(&self, what: &str, error: ClError) -> EngineError {
        fault(&self.device, what, error)
    }

    /// Allocates device memory, at least a byte.
    pub(super) fn allocate(&self, bytes: usize, what: &str) -> Result<Buffer<u8>, EngineError> {
        if bytes as u64 > self.buffer_max_bytes {
            let (needed_bytes, free_bytes) = (bytes as u64, self.buffer_max_bytes);
            return Err(EngineError::OutOfMemory { what: format!("{what}, in one buffer"), needed_bytes, free_bytes });
        }
        // SAFETY: no host memory is given.
        let buffer = unsafe { Buffer::create(&self.context, CL_MEM_READ_WRITE, bytes.max(1), std::ptr::null_mut()) };
        buffer.map_err(|error| self.fault(&format!("allocating {bytes} bytes for {what}"), error))
    }

    /// Copies `values` into `buffer` from byte `offset` on, and waits until that is done.
    pub(super) fn write<T: Copy>(
        &self,
        buffer: &mut Buffer<u8>,
        offset: usize,
        values: &[T],
    ) -> Result<(), EngineError> {
        if values.is_empty() {
            return Ok(());
        }
        // SAFETY: any initialised `T` of the callers (integers and floats) is bytes, and the slice lives until the
        // event is complete.
        let event = unsafe {
            let bytes = std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values));
            self.queue.enqueue_write_buffer(buffer, CL_NON_BLOCKING, offset, bytes, &[])
        };
        self.wait(&event.map_err(|error| self.fault("writing to the device", error))?)
    }

    /// Reads floats from `buffer` from byte `offset` on.
    pub(super) fn read(&self, buffer: &Buffer<u8>, offset: usize, values: &mut [f32]) -> Result<(), EngineError> {
        if values.is_empty() {
            return Ok(());
        }
        // SAFETY: any bytes are floats, and the slice lives until the event is complete.
        let event = unsafe {
            let bytes = std::slice::from_raw_parts_mut(values.as_mut_ptr().cast::<u8>(), size_of_val(values));
            self.queue.enqueue_read_buffer(buffer, CL_NON_BLOCKING, offset, bytes, &[])
        };
        self.wait(&event.map_err(|error| self.fault("reading from the device", error))?)
    }

    /// Copies `bytes` within a buffer; the ranges do not overlap.
    pub(super) fn copy(
        &self,
        buffer: &mut Buffer<u8>,
        from: usize,
        to: usize,
        bytes: usize,
    ) -> Result<(), EngineError> {
        let source: *const Buffer<u8> = buffer;
        // SAFETY: the source is the same buffer, which outlives the call; OpenCL allows ranges that do not overlap.
        let copied = unsafe { self.queue.enqueue_copy_buffer(&*source, buffer, from, to, bytes, &[]) };
        copied.map(drop).map_err(|error| self.fault("copying on the device", error))
    }

    /// Queues a kernel with `arguments`. `groups` is the number of work-groups of [`LANES`] lanes in both dimensions.
    pub(super) fn run(
        &mut self,
        set: KernelSet,
        name: &'static str,
        arguments: &[Arg],
        groups: (usize, usize),
    ) -> Result<(), EngineError> {
        if groups.0 == 0 || groups.1 == 0 {
            return Ok(());
        }
        if !self.kernels.contains_key(&(set, name)) {
            let kernel = self.compile(set, name)?;
            self.kernels.insert((set, name), kernel);
        }
        let kernel = &self.kernels[&(set, name)];
        for (index, argument) in arguments.iter().enumerate() {
            set_argument(kernel, index, argument).map_err(|error| self.fault(name, error))?;
        }
        let (global, local) = ([groups.0 * LANES, groups.1], [LANES, 1]);
        // SAFETY: the arrays have two dimensions each and live during the call.
        let queued = unsafe {
            let (global, local) = (global.as_ptr(), local.as_ptr());
            self.queue.enqueue_nd_range_kernel(kernel.get(), 2, std::ptr::null(), global, local, &[])
        };
        queued.map(drop).map_err(|error| self.fault(name, error))
    }

    fn compile(&mut self, set: KernelSet, name: &str) -> Result<Kernel, EngineError> {
        if !self.programs.contains_key(&set) {
            let program = self.build(set)?;
            self.programs.insert(set, program);
        }
        Kernel::create(&self.programs[&set], name).map_err(|error| self.fault(name, error))
    }

    fn build(&self, set: KernelSet) -> Result<Program, EngineError> {
        let (source, defines) = match set {
            KernelSet::Rows => (ROWS, String::new()),
            KernelSet::Products(coded, tile) => (PRODUCTS, format!(" -DTILE={tile} {}", coded.defines())),
            KernelSet::Attention(KvElement::F16) => (ATTENTION, " -DCACHE=16".to_owned()),
            KernelSet::Attention(KvElement::F32) => (ATTENTION, " -DCACHE=32".to_owned()),
            KernelSet::Attention(KvElement::Q8_0) => (ATTENTION, " -DCACHE=8".to_owned()),
        };
        let mut program = Program::create_from_source(&self.context, &[FUNCTIONS, source].concat())
            .map_err(|error| self.fault("reading kernels", error))?;
        let built = program.build(self.context.devices(), &format!("{OPTIONS} {}{defines}", self.division.option()));
        match built {
            Ok(()) => Ok(program),
            Err(error) => {
                let log = program.get_build_log(self.context.default_device()).unwrap_or_default();
                let what = format!("compiling {set:?}: {error}: {}", log.trim());
                Err(EngineError::Device { device: self.device.clone(), fault: DeviceFault::Compile, what })
            }
        }
    }

    /// Waits until all queued work is done.
    pub(super) fn finish(&self) -> Result<(), EngineError> {
        // SAFETY: no events are waited for.
        let marker = unsafe { self.queue.enqueue_marker_with_wait_list(&[]) };
        self.wait(&marker.map_err(|error| self.fault("ending a step", error))?)
    }

    fn wait(&self, event: &Event) -> Result<(), EngineError> {
        self.queue.flush().map_err(|error| self.fault("starting queued work", error))?;
        let (mut sleep, longest) = SLEEPS;
        loop {
            let status = event.command_execution_status().map_err(|error| self.fault("waiting", error))?;
            match status.0 {
                CL_COMPLETE => return Ok(()),
                code if code < 0 => return Err(self.fault("queued work", ClError(code))),
                _ => std::thread::sleep(sleep),
            }
            sleep = (sleep * 2).min(longest);
        }
    }
}

fn set_argument(kernel: &Kernel, index: usize, argument: &Arg) -> Result<(), ClError> {
    let index = u32::try_from(index).unwrap_or(u32::MAX);
    // SAFETY: OpenCL checks the size of each argument; the callers pass the types that the kernel declares.
    unsafe {
        match argument {
            Arg::Memory(memory) => kernel.set_arg(index, memory),
            Arg::Int(value) => kernel.set_arg(index, value),
            Arg::Unsigned(value) => kernel.set_arg(index, value),
            Arg::Long(value) => kernel.set_arg(index, value),
            Arg::Float(value) => kernel.set_arg(index, value),
            Arg::Local(bytes) => kernel.set_arg_local_buffer(index, *bytes),
        }
    }
}

impl Arg {
    /// The argument of a buffer.
    pub(super) fn of(buffer: &Buffer<u8>) -> Self {
        Self::Memory(buffer.get())
    }

    /// The argument of memory that the kernel does not read.
    pub(super) fn unused() -> Self {
        Self::Memory(std::ptr::null_mut::<c_void>())
    }

    /// The argument of a count or an index; device memory limits it far below 2³¹.
    pub(super) fn int(value: usize) -> Self {
        Self::Int(i32::try_from(value).unwrap_or(i32::MAX))
    }

    pub(super) fn flag(value: bool) -> Self {
        Self::Int(i32::from(value))
    }
}
