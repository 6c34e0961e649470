// Command demo shows the mesh at work on one machine, without Kubernetes: two nodes made of network namespaces, the real
// programs on each, and a table of calls with what was seen of them. It ends with status 1 when a call did not go as it
// must.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/fairlead-mesh/fairlead/tests/netns/lab"
)

func main() {
	lab.RunIfChild()
	bin := flag.String("bin", "bin", "directory of the mesh's programs")
	keep := flag.Bool("keep", false, "leave logs and configuration in place at the end")
	down := flag.Bool("down", false, "only remove what a killed run left behind")
	flag.Parse()
	if *down {
		if err := lab.Prune(); err != nil {
			fmt.Fprintln(os.Stderr, "demo:", err)
			os.Exit(1)
		}
		fmt.Println("nothing of a demo is left on this machine")
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// After the first signal the demo cleans up; a second one ends it at once.
	context.AfterFunc(ctx, stop)
	if err := run(ctx, *bin, *keep); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// errRows says that the demo ran, but not all rows are as they must be.
var errRows = errors.New("the rows marked with ✗ are not as they must be")

var errInterrupted = errors.New("interrupted; everything is taken away again")

func run(ctx context.Context, bin string, keep bool) (err error) {
	start := time.Now()
	progress := func(format string, args ...any) {
		fmt.Printf("%5.1f s  %s\n", time.Since(start).Seconds(), fmt.Sprintf(format, args...))
	}
	w, err := lab.New(lab.Options{Bin: bin, Keep: keep, Log: progress})
	if err != nil {
		return err
	}
	progress("two nodes and the link between them")
	d := &demo{w: w, progress: progress}
	defer func() {
		if err != nil && ctx.Err() == nil {
			w.Keep()
		}
		err = errors.Join(err, w.Close())
		if keep || err != nil && ctx.Err() == nil {
			fmt.Printf("logs and configuration: %s (removed by the next run, or make demo-down)\n", w.Dir)
		}
	}()
	err = d.play(ctx)
	if ctx.Err() != nil {
		return errInterrupted
	}
	if len(d.rows) > 0 {
		fmt.Println()
		d.print(os.Stdout)
	}
	if err != nil {
		return err
	}
	if d.failed() {
		return errRows
	}
	fmt.Printf("\n%d calls, all as they must be, in %.1f s\n", len(d.rows), time.Since(start).Seconds())
	return nil
}
