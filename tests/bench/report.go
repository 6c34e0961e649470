package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// spread is the median of some figures with the least and the greatest.
type spread struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

func spreadOf(values []float64) spread {
	if len(values) == 0 {
		return spread{math.NaN(), math.NaN(), math.NaN()}
	}
	values = slices.Sorted(slices.Values(values))
	middle := len(values) / 2
	median := values[middle]
	if len(values)%2 == 0 {
		median = (values[middle-1] + values[middle]) / 2
	}
	return spread{median, values[0], values[len(values)-1]}
}

func (s spread) String() string {
	if math.IsNaN(s.Median) {
		return "–"
	}
	return fmt.Sprintf("**%s** (%s–%s)", digits(s.Median), digits(s.Min), digits(s.Max))
}

// digits writes a figure with three of them, or as a whole number.
func digits(v float64) string {
	if v == 0 || math.IsNaN(v) {
		return "–"
	}
	if math.Abs(v) >= 100 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.*f", max(0, 2-int(math.Floor(math.Log10(math.Abs(v))))), v)
}

// summary is one test on one lane.
type summary struct {
	test    test
	lane    string
	cpu     spread
	rate    spread
	p50     spread
	p99     spread
	foreign spread
	noisy   int
	errors  []string
}

func summarize(f figures, t test, lane string) (summary, bool) {
	s := summary{test: t, lane: lane}
	var cpu, rate, p50, p99, foreign []float64
	found := false
	for _, r := range f.runs {
		if r.Test != t.name || r.Lane != lane {
			continue
		}
		found = true
		if r.Result.Errors > 0 {
			s.errors = append(s.errors, fmt.Sprintf("%d errors: %s", r.Result.Errors, r.Result.First))
		}
		if r.Error != "" {
			s.errors = append(s.errors, r.Error)
			continue
		}
		if len(r.CPU) > 0 {
			cpu = append(cpu, r.perUnit(t))
		}
		rate = append(rate, r.Result.Rate/t.rateOf)
		if r.Result.P50 > 0 {
			p50, p99 = append(p50, r.Result.P50), append(p99, r.Result.P99)
		}
		foreign = append(foreign, r.Foreign)
		if r.Noisy {
			s.noisy++
		}
	}
	s.cpu, s.rate, s.p50, s.p99, s.foreign = spreadOf(cpu), spreadOf(rate), spreadOf(p50), spreadOf(p99), spreadOf(foreign)
	return s, found
}

// report prints the tables and writes them, the plot and the raw figures to the output directory.
func (w *world) report(f figures) error {
	machine := describeMachine(w)
	text := w.markdown(f, machine)
	fmt.Print("\n" + text)
	if err := os.MkdirAll(w.options.out, 0o755); err != nil {
		return err
	}
	raw, err := json.MarshalIndent(map[string]any{
		"machine": machine, "lanes": w.laneFacts(), "absent": w.absent, "runs": f.runs, "memory": f.memory, "options": os.Args[1:],
	}, "", " ")
	if err != nil {
		return err
	}
	name := filepath.Join(w.options.out, started.UTC().Format("20060102-150405"))
	err = errorsOf(
		os.WriteFile(name+".md", []byte(text), 0o644),
		os.WriteFile(name+".svg", []byte(w.plot(f)), 0o644),
		os.WriteFile(name+".json", raw, 0o644),
	)
	if err == nil && w.options.document != "" {
		err = errorsOf(
			writeDocument(w.options.document, text),
			os.WriteFile(strings.TrimSuffix(w.options.document, ".md")+".svg", []byte(w.plot(f)), 0o644),
		)
	}
	fmt.Fprintf(os.Stderr, "\nwritten: %s.md, .svg and .json\n", name)
	return err
}

func (w *world) laneFacts() []map[string]string {
	var all []map[string]string
	for _, l := range w.lanes {
		all = append(all, map[string]string{"lane": l.name, "about": l.about, "version": l.version, "tls": l.suite})
	}
	return all
}

func (w *world) markdown(f figures, machine []string) string {
	var b strings.Builder
	for _, fact := range machine {
		fmt.Fprintf(&b, "- %s\n", fact)
	}
	fmt.Fprintf(&b, "- %d repetitions of %v, lanes in turns; median (least–greatest)\n\n", w.options.reps, w.options.duration)
	b.WriteString("| lane | what it is | TLS as seen on the wire |\n|---|---|---|\n")
	for _, l := range w.lanes {
		fmt.Fprintf(&b, "| %s | %s (%s) | %s |\n", l.name, l.about, l.version, l.suite)
	}
	for _, a := range w.absent {
		fmt.Fprintf(&b, "| %s | %s | |\n", a.Lane, a.Why)
	}
	for _, t := range tests {
		if !slices.Contains(w.options.tests, t.name) {
			continue
		}
		fmt.Fprintf(&b, "\n**%s**: %s\n\n| lane | CPU s/%s, all proxies | %s | p50 µs | p99 µs | foreign CPUs |\n|---|---|---|---|---|---|\n",
			t.name, t.about, t.unit, t.rate)
		for _, l := range w.lanes {
			s, found := summarize(f, t, l.name)
			if !found {
				continue
			}
			fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %.2f%s |\n", l.name, s.cpu, s.rate, s.p50, s.p99, s.foreign.Median, s.remarks())
		}
		for _, a := range w.absent {
			fmt.Fprintf(&b, "| %s | not given | | | | |\n", a.Lane)
		}
	}
	w.memoryTable(&b, f)
	b.WriteString(w.goalTable(f))
	return b.String()
}

// remarks are what a reader must know of a row.
func (s summary) remarks() string {
	text := ""
	if s.noisy > 0 {
		text += fmt.Sprintf(", %d run(s) disturbed", s.noisy)
	}
	for _, e := range s.errors {
		text += ", FAILED: " + e
	}
	return text
}

func (w *world) memoryTable(b *strings.Builder, f figures) {
	if len(f.memory) == 0 {
		return
	}
	fmt.Fprintf(b, "\n**memory**: resident MiB, client's side / server's side\n\n| lane | idle | with %d idle connections | with %d | KiB for each of the difference | %v after they ended |\n|---|---|---|---|---|---|\n",
		w.options.idle/5, w.options.idle, settle)
	for _, m := range f.memory {
		if m.Error != "" {
			fmt.Fprintf(b, "| %s | FAILED: %s | | | | |\n", m.Lane, m.Error)
			continue
		}
		fmt.Fprintf(b, "| %s | %s | %s | %s | %s | %s |\n", m.Lane, sides(m.Idle), sides(m.Few), sides(m.Open), sides(m.each()), sides(m.Closed))
	}
	for _, a := range w.absent {
		fmt.Fprintf(b, "| %s | not given | | | | |\n", a.Lane)
	}
}

// The lines of a document between which the tables are.
const (
	figuresBegin = "<!-- figures: hack/bench.sh --doc docs/benchmarks.md writes them -->\n"
	figuresEnd   = "<!-- end of figures -->"
)

// writeDocument puts text where a document has its figures.
func writeDocument(path, text string) error {
	content, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, begins := strings.Cut(string(content), figuresBegin)
	_, after, ends := strings.Cut(rest, figuresEnd)
	if !begins || !ends {
		return fmt.Errorf("%s has no place for figures (%q to %q)", path, strings.TrimSpace(figuresBegin), figuresEnd)
	}
	return os.WriteFile(path, []byte(before+figuresBegin+text+figuresEnd+after), 0o644)
}

func sides(values []float64) string {
	var all []string
	for _, v := range values {
		all = append(all, digits(v))
	}
	return strings.Join(all, " / ")
}

// describeMachine is what figures depend on.
func describeMachine(w *world) []string {
	var name unix.Utsname
	kernel := "unknown"
	if unix.Uname(&name) == nil {
		kernel = unix.ByteSliceToString(name.Release[:])
	}
	cpu := fieldOf("/proc/cpuinfo", "model name")
	kind := "bare metal"
	if strings.Contains(" "+fieldOf("/proc/cpuinfo", "flags")+" ", " hypervisor ") {
		kind = "virtual machine"
	}
	memory := cmp.Or(fieldOf("/proc/meminfo", "MemTotal"), "unknown")
	pinned := ""
	if w.options.pin > 0 {
		pinned = fmt.Sprintf(", all on %d of them", w.options.pin)
	}
	return []string{
		fmt.Sprintf("%s, %s, %d CPUs shared by clients, proxies and servers%s, memory %s", kind, cpu, w.cpus.Count(), pinned, memory),
		fmt.Sprintf("Linux %s, congestion control %s, harness built with %s", kernel, w.a.control, runtime.Version()),
		time.Now().UTC().Format("2006-01-02 15:04 UTC"),
	}
}

// fieldOf is the first value of a "key : value" file of /proc.
func fieldOf(path, key string) string {
	for line := range strings.Lines(readOr(path)) {
		k, v, ok := strings.Cut(line, ":")
		if ok && strings.TrimSpace(k) == key {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// readOr is a file's content, or nothing.
func readOr(path string) string {
	content, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return string(content)
}
