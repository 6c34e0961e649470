package build

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Builder says where the modules are and where the results go.
type Builder struct {
	Source string    // hack/cluster/build
	Cache  string    // …/fairlead/cluster
	Out    io.Writer // progress, for people
}

// Tools is a finished set of programs and images.
type Tools struct {
	Hash   string
	Bin    string // every program; CNI plugins are in Bin/cni
	Images string // image tars every node gets
}

// part is a component with what its inputs say.
type part struct {
	component
	source, version, dir string // dir: where the programs are once built
}

// Ensure builds what is not in the cache yet. Concurrent calls wait for each other.
func (b Builder) Ensure(ctx context.Context) (Tools, error) {
	parts, tools, err := b.resolve(ctx)
	if err != nil {
		return Tools{}, err
	}
	if exists(filepath.Join(tools.Bin, "..", "complete")) {
		return tools, nil
	}
	unlock, err := b.lock()
	if err != nil {
		return Tools{}, err
	}
	defer unlock()
	var missing []part
	for _, p := range parts {
		if !exists(p.dir) {
			missing = append(missing, p)
		}
	}
	if len(missing) > 0 {
		fmt.Fprintf(b.Out, "Building %d of %d components from Go modules into %s.\n", len(missing), len(parts), b.Cache)
		fmt.Fprintln(b.Out, "With an empty Go build cache and two cores that is about 15 minutes for all; with a warm one, seconds.")
	}
	start := time.Now()
	for i, p := range missing {
		next := ""
		if i+1 < len(missing) {
			next = fmt.Sprintf("; next: %s (about %s cold)", missing[i+1].name, missing[i+1].cold)
		}
		fmt.Fprintf(b.Out, "[%d/%d] %s %s: about %s cold%s\n", i+1, len(missing), p.name, p.version, p.cold, next)
		if err := b.compile(ctx, p); err != nil {
			return Tools{}, fmt.Errorf("building %s: %w", p.name, err)
		}
	}
	if err := b.assemble(parts, tools); err != nil {
		return Tools{}, fmt.Errorf("assembling %s: %w", tools.Bin, err)
	}
	if len(missing) > 0 {
		fmt.Fprintf(b.Out, "Built in %.0f s.\n", time.Since(start).Seconds())
	}
	return tools, nil
}

// resolve works out, without building, where everything is or will be.
func (b Builder) resolve(ctx context.Context) ([]part, Tools, error) {
	v, err := exec.CommandContext(ctx, "go", "env", "GOVERSION").Output()
	if err != nil {
		return nil, Tools{}, fmt.Errorf("asking go for its version (hack/prereq.sh checks what is needed): %w", err)
	}
	toolchain := strings.TrimSpace(string(v)) + " " + runtime.GOARCH
	all := sha256.New()
	fmt.Fprintln(all, imagesRecipe, busybox())
	var parts []part
	for _, c := range components() {
		p := part{component: c, source: filepath.Join(b.Source, c.name)}
		goMod, err := os.ReadFile(filepath.Join(p.source, "go.mod"))
		if err != nil {
			return nil, Tools{}, err
		}
		if p.version, err = moduleVersion(goMod, c.module); err != nil {
			return nil, Tools{}, fmt.Errorf("%s: %w", p.source, err)
		}
		hash, err := c.inputs(p.source, p.version, toolchain)
		if err != nil {
			return nil, Tools{}, err
		}
		p.dir = filepath.Join(b.Cache, "parts", c.name+"-"+hash)
		fmt.Fprintln(all, c.name, hash)
		parts = append(parts, p)
	}
	hash := hex.EncodeToString(all.Sum(nil))[:16]
	root := filepath.Join(b.Cache, hash)
	return parts, Tools{Hash: hash, Bin: filepath.Join(root, "bin"), Images: filepath.Join(root, "images")}, nil
}

func (b Builder) lock() (func(), error) {
	if err := os.MkdirAll(b.Cache, 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(b.Cache, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		fmt.Fprintln(b.Out, "Waiting for another build to finish.")
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("locking %s: %w", f.Name(), err)
	}
	return func() { f.Close() }, nil
}

// compile builds p beside its place and renames, so that an interrupted build
// leaves nothing that looks finished.
func (b Builder) compile(ctx context.Context, p part) error {
	if err := os.MkdirAll(filepath.Dir(p.dir), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(p.dir), ".building-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	start := time.Now()
	for _, group := range byDirectory(p.programs) {
		if err := b.goBuild(ctx, p, tmp, group); err != nil {
			return err
		}
	}
	fmt.Fprintf(b.Out, "      %s: %d programs in %.0f s\n", p.name, len(p.programs), time.Since(start).Seconds())
	return os.Rename(tmp, p.dir)
}

// byDirectory groups programs that one "go build -o dir/" can make: those whose
// file is called what go would call it. Others are built alone.
func byDirectory(programs []program) [][]program {
	var groups [][]program
	at := map[string]int{}
	for _, pr := range programs {
		dir := filepath.Dir(pr.out)
		if filepath.Base(pr.pkg) != filepath.Base(pr.out) {
			groups = append(groups, []program{pr})
			continue
		}
		if i, ok := at[dir]; ok {
			groups[i] = append(groups[i], pr)
			continue
		}
		at[dir] = len(groups)
		groups = append(groups, []program{pr})
	}
	return groups
}

func (b Builder) goBuild(ctx context.Context, p part, tmp string, group []program) error {
	out := filepath.Join(tmp, group[0].out)
	if len(group) > 1 {
		out = filepath.Dir(out) + "/"
	}
	if err := os.MkdirAll(filepath.Dir(filepath.Join(tmp, group[0].out)), 0o755); err != nil {
		return err
	}
	args := []string{"build", "-v", "-trimpath", "-buildvcs=false", "-ldflags", p.linkFlags(p.version), "-o", out}
	for _, pr := range group {
		args = append(args, pr.pkg)
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = p.source
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=")
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	tail := b.follow(stderr, p.name)
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("go build: %w\n%s", err, tail)
	}
	return nil
}

// follow reads go build -v's output until it ends, tells now and then how far it
// is, and returns the last lines that are not names of packages.
func (b Builder) follow(r io.Reader, name string) string {
	const every = 15 * time.Second
	var packages, downloads atomic.Int64
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		start, tick := time.Now(), time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				fmt.Fprintf(b.Out, "      %s: %.0f s, %d modules fetched, %d packages compiled\n", name, time.Since(start).Seconds(), downloads.Load(), packages.Load())
			}
		}
	})
	var tail []string
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		line := sc.Text()
		switch {
		case strings.HasPrefix(line, "go: downloading"):
			downloads.Add(1)
		case !strings.ContainsAny(line, " \t"):
			packages.Add(1)
		default:
			if tail = append(tail, line); len(tail) > 40 {
				tail = tail[1:]
			}
		}
	}
	close(done)
	wg.Wait()
	return strings.Join(tail, "\n")
}

// assemble gathers the parts under one directory, by hard links, and makes the
// images that every node needs.
func (b Builder) assemble(parts []part, t Tools) error {
	root := filepath.Dir(t.Bin)
	if err := os.RemoveAll(root); err != nil {
		return err
	}
	for _, d := range []string{filepath.Join(t.Bin, "cni"), t.Images} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	for _, p := range parts {
		for _, pr := range p.programs {
			if err := os.Link(filepath.Join(p.dir, pr.out), filepath.Join(t.Bin, pr.out)); err != nil {
				return err
			}
		}
	}
	if err := writeImages(t); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(root, "complete"), nil, 0o644)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
