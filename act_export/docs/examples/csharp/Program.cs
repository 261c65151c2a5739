// Greedy generation in C#: dotnet run -- MODEL LIBRARY COUNT TOKEN... [calibration=FILE]
//
// Prints COUNT new tokens after the prompt's. LIBRARY is libact_ops.so, with a slash in its path. FILE is a calibration
// for this request, as `act-export adapter MODEL --calibration C --out FILE.bin` writes it. The key-value cache
// and the sink state are whatever inputs the model has that begin with "past": each is a buffer for the whole run, bound
// as the input and as the output that continues it, so that a step writes into it and copies nothing.
using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Runtime.InteropServices;
using Microsoft.ML.OnnxRuntime;
using Microsoft.ML.OnnxRuntime.Tensors;

internal static class Program
{
    private static int Main(string[] arguments)
    {
        if (arguments.Length < 4)
        {
            Console.Error.WriteLine("usage: generate MODEL LIBRARY COUNT TOKEN... [calibration=FILE]");
            return 2;
        }
        try
        {
            const string option = "calibration=";
            string chosen = arguments.Skip(3).FirstOrDefault(word => word.StartsWith(option, StringComparison.Ordinal));
            float[] calibration = null;
            if (chosen != null)
            {
                calibration = MemoryMarshal.Cast<byte, float>(File.ReadAllBytes(chosen.Substring(option.Length))).ToArray();
            }
            long[] prompt = arguments.Skip(3).Where(word => word != chosen).Select(long.Parse).ToArray();
            IEnumerable<long> generated =
                Generate(arguments[0], arguments[1], int.Parse(arguments[2]), prompt, calibration);
            Console.WriteLine(string.Join(" ", generated));
            return 0;
        }
        catch (Exception error) when (error is OnnxRuntimeException or NotSupportedException or FormatException or IOException)
        {
            Console.Error.WriteLine($"error: {error.Message}");
            return 1;
        }
    }

    private static IEnumerable<long> Generate(string model, string library, int count, long[] prompt, float[] calibration)
    {
        using var options = new SessionOptions { LogSeverityLevel = OrtLoggingLevel.ORT_LOGGING_LEVEL_ERROR };
        options.RegisterCustomOpLibrary(library);
        using var session = new InferenceSession(model, options);
        using var generator = new Generator(session, prompt.Length + count, calibration);
        long[] tokens = prompt;
        for (int i = 0; i < count; i++)
        {
            tokens = new[] { generator.Step(tokens) };
            yield return tokens[0];
        }
    }
}

internal sealed class Generator : IDisposable
{
    private readonly InferenceSession session;
    private readonly OrtIoBinding binding;
    private readonly RunOptions runOptions = new RunOptions();
    private readonly List<OrtValue> state = new List<OrtValue>();
    private readonly bool takesPositions;
    private long seen;

    // calibration: beta, gamma and threshold of each head that the model can calibrate; null for its default.
    public Generator(InferenceSession session, long capacity, float[] calibration = null)
    {
        this.session = session;
        binding = session.CreateIoBinding();
        binding.BindOutputToDevice("logits", OrtMemoryInfo.DefaultInstance); // first, so it is the first of the outputs
        foreach (KeyValuePair<string, NodeMetadata> input in session.InputMetadata)
        {
            string name = input.Key;
            if (name.StartsWith("past", StringComparison.Ordinal))
            {
                OrtValue buffer = Buffer(name, input.Value, capacity);
                state.Add(buffer);
                binding.BindInput(name, buffer);
                binding.BindOutput(PresentName(name), buffer);
            }
            else if (name == "position_ids")
            {
                takesPositions = true;
            }
            else if (name != "input_ids" && name != "attention_mask")
            {
                throw new NotSupportedException($"the model has an input that isn't known here: {name}");
            }
        }
        if (session.OverridableInitializerMetadata.ContainsKey("logits_to_keep"))
        {
            OrtValue last = OrtValue.CreateTensorValueFromMemory(new long[] { 1 }, Array.Empty<long>());
            state.Add(last);
            binding.BindInput("logits_to_keep", last);
        }
        if (calibration != null) // adapters have no effect on bound inputs, so it is bound itself
        {
            OrtValue strengths = OrtValue.CreateTensorValueFromMemory(calibration, new long[] { 1, calibration.Length / 3, 3 });
            state.Add(strengths);
            binding.BindInput("calibration", strengths);
        }
    }

    // Runs the model over new tokens, which follow those it has seen; returns the likeliest next one.
    public long Step(long[] tokens)
    {
        long[] positions = tokens.Select((_, i) => seen + i).ToArray();
        seen += tokens.Length;
        long[] mask = Enumerable.Repeat(1L, (int)seen).ToArray();
        using OrtValue inputIds = OrtValue.CreateTensorValueFromMemory(tokens, new long[] { 1, tokens.Length });
        using OrtValue attentionMask = OrtValue.CreateTensorValueFromMemory(mask, new long[] { 1, seen });
        using OrtValue positionIds = OrtValue.CreateTensorValueFromMemory(positions, new long[] { 1, tokens.Length });
        binding.BindInput("input_ids", inputIds);
        binding.BindInput("attention_mask", attentionMask);
        if (takesPositions)
        {
            binding.BindInput("position_ids", positionIds);
        }
        session.RunWithBinding(runOptions, binding);
        using IDisposableReadOnlyCollection<OrtValue> outputs = binding.GetOutputValues();
        return NextToken(outputs.First());
    }

    public void Dispose()
    {
        binding.Dispose();
        runOptions.Dispose();
        state.ForEach(value => value.Dispose());
    }

    // past_key_values.0.key -> present.0.key, past_sink_scores.0 -> present_sink_scores.0
    private static string PresentName(string past)
    {
        const string cache = "past_key_values";
        return "present" + past.Substring(past.StartsWith(cache, StringComparison.Ordinal) ? cache.Length : "past".Length);
    }

    // An empty buffer (1, heads, capacity, size) for a state input (batch, heads, past, size).
    private static OrtValue Buffer(string name, NodeMetadata input, long capacity)
    {
        int[] shape = input.Dimensions;
        if (shape.Length != 4 || shape[1] < 1 || shape[3] < 1)
        {
            throw new NotSupportedException($"the model doesn't say how many heads {name} has, and of which size");
        }
        long[] whole = { 1, shape[1], capacity, shape[3] };
        return OrtValue.CreateAllocatedTensorValue(OrtAllocator.DefaultInstance, input.ElementDataType, whole);
    }

    // The likeliest token after the last position of logits (1, positions, vocabulary).
    private static long NextToken(OrtValue logits)
    {
        OrtTensorTypeAndShapeInfo info = logits.GetTensorTypeAndShape();
        int vocabulary = (int)info.Shape[2];
        switch (info.ElementDataType)
        {
            case TensorElementType.Float:
                return Largest(logits.GetTensorDataAsSpan<float>(), vocabulary, number => number);
            case TensorElementType.Float16:
                return Largest(MemoryMarshal.Cast<Float16, ushort>(logits.GetTensorDataAsSpan<Float16>()), vocabulary, Key);
            default:
                throw new NotSupportedException($"logits of type {info.ElementDataType} can't be read here");
        }
    }

    // float16 is compared by its bits, whose order is that of the numbers but for the sign.
    private static float Key(ushort bits) => (bits & 0x8000) != 0 ? -(bits & 0x7fff) : bits;

    private static long Largest<T>(ReadOnlySpan<T> values, int vocabulary, Func<T, float> key)
    {
        ReadOnlySpan<T> last = values.Slice(values.Length - vocabulary);
        int best = 0;
        for (int i = 1; i < last.Length; i++)
        {
            if (key(last[i]) > key(last[best]))
            {
                best = i;
            }
        }
        return best;
    }
}
