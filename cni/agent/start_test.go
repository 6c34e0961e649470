package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"go.uber.org/zap"

	"github.com/fairlead-mesh/fairlead/cni/plugin"
)

// A start that waits for those of other pods ends when the runtime no longer waits for it, and nothing comes of it.
func TestStartThatNobodyWaitsFor(t *testing.T) {
	n := newNode(t)
	n.proxy()
	n.stop()
	asked, recorded, goOn := make(chan struct{}, 64), make(chan struct{}, 64), make(chan struct{})
	n.cfg.Steps = func(step string) {
		switch step {
		case "start: asked":
			asked <- struct{}{}
		case "start: recorded":
			recorded <- struct{}{}
			<-goOn
		}
	}
	n.run()
	starting := func(name string, last byte) *pod { // without an address: the watch waits for the plugin
		p := n.sandbox(name, last)
		n.object(p, modeLabel+": "+modeAmbient, false)
		return p
	}
	var started sync.WaitGroup
	for i := range runtime.GOMAXPROCS(0) {
		p := starting(fmt.Sprint("first-", i), byte(i+2))
		started.Go(func() {
			if answer, err := n.call(http.MethodPost, plugin.AddPath, p.event()); err != nil || !answer.Redirected {
				t.Errorf("%s: %+v, %v", p.name, answer, err)
			}
		})
		<-asked
		<-recorded
	}
	last := starting("last", 1)
	conn, err := net.Dial("unix", n.cfg.EventSocket)
	if err != nil {
		t.Fatal(err)
	}
	body := last.event()
	if _, err := fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: agent\r\nContent-Length: %d\r\n\r\n%s", plugin.AddPath, len(body), body); err != nil {
		t.Fatal(err)
	}
	<-asked
	conn.Close()
	// The runtime takes back what it gave up, while the other pods still start.
	if _, err := n.call(http.MethodPost, plugin.DelPath, last.event()); err != nil {
		t.Errorf("take the last pod's start back: %v", err)
	}
	close(goOn)
	started.Wait()
	if len(recorded) != 0 {
		t.Error("the last pod's start was carried out")
	}
	if _, err := os.Stat(filepath.Join(n.cfg.RunDir, "pods", last.uid+".json")); err == nil {
		t.Error("the last pod has a record")
	}
}

// One that gets its turn too late does not touch what has become of the pod meanwhile.
func TestStartAfterItWasGivenUp(t *testing.T) {
	recs, _, err := openRecords(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	newer := record{UID: "u", ContainerID: "newer", Cookie: 2}
	if err := recs.put(newer); err != nil {
		t.Fatal(err)
	}
	e := &enroller{log: zap.NewNop(), records: recs, turns: map[string]*turn{}, starting: make(chan struct{}, 1), used: make(chan struct{}, 1)}
	e.steps = func(step string) {
		if step != "start: asked" {
			t.Fatalf("it came to %q", step)
		}
	}
	ctx, giveUp := context.WithCancel(t.Context())
	giveUp()
	for range 20 { // there is a place for it, too
		if err := e.start(ctx, record{UID: "u", ContainerID: "older", Cookie: 1}, nil); !errors.Is(err, context.Canceled) {
			t.Errorf("start: %v", err)
		}
	}
	if got, _ := recs.get("u"); got.ContainerID != "newer" {
		t.Errorf("the pod's record is of its sandbox %s", got.ContainerID)
	}
}
