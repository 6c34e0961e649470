package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/fairlead-mesh/fairlead/tests/bench/load"
)

// memory is the resident memory of a lane's proxies, in MiB, first the client's side.
type memory struct {
	Lane        string    `json:"lane"`
	Connections int       `json:"connections"`
	Idle        []float64 `json:"idle_mib"`
	// Few is with a fifth of the connections: what is more with all of them is theirs, and not what the proxies need to
	// carry any (code that is used for the first time, buffers).
	Few    []float64 `json:"few_mib"`
	Open   []float64 `json:"open_mib"`
	Closed []float64 `json:"closed_mib"`
	Error  string    `json:"error,omitempty"`
}

// settle is how long memory is given to come to rest.
const settle = 6 * time.Second

// measureMemory looks at proxies that have carried next to nothing, then with idle connections, then after those.
func (w *world) measureMemory(ctx context.Context, l *lane, connections int) memory {
	m := memory{Lane: l.name, Connections: connections}
	err := func() (err error) {
		time.Sleep(settle)
		if m.Idle, err = l.resident(); err != nil {
			return err
		}
		few, err := l.hold(ctx, connections/5)
		if err != nil {
			return err
		}
		defer few.stop()
		if m.Few, err = l.resident(); err != nil {
			return err
		}
		rest, err := l.hold(ctx, connections-connections/5)
		if err != nil {
			return err
		}
		defer rest.stop()
		if m.Open, err = l.resident(); err != nil {
			return err
		}
		few.stop()
		rest.stop()
		time.Sleep(settle)
		m.Closed, err = l.resident()
		return err
	}()
	if err != nil {
		m.Error = err.Error()
	}
	return m
}

// each is the memory of one connection, in KiB.
func (m memory) each() []float64 {
	var each []float64
	for i := range m.Open {
		each = append(each, (m.Open[i]-m.Few[i])*1024/float64(m.Connections-m.Connections/5))
	}
	return each
}

// resident is the memory of the proxies on the way to the other machine.
func (l *lane) resident() ([]float64, error) {
	var all []float64
	for _, p := range l.serving(remote) {
		mib, err := p.resident()
		if err != nil {
			return nil, err
		}
		all = append(all, mib)
	}
	return all, nil
}

// hold starts a client that opens connections and keeps them, and waits until all is at rest.
func (l *lane) hold(ctx context.Context, connections int) (*process, error) {
	holder, err := l.startHolder(connections)
	if err != nil {
		return nil, err
	}
	if err := awaitHeld(ctx, holder, connections); err != nil {
		holder.stop()
		return nil, err
	}
	time.Sleep(settle)
	return holder, nil
}

func (l *lane) startHolder(connections int) (*process, error) {
	p := l.pods[client]
	argument, err := json.Marshal(load.Client{Kind: "idle", Addr: l.pods[remote].addr.String(), Connections: connections})
	if err != nil {
		return nil, err
	}
	return command{
		name: "idle client of " + l.name, ns: p.ns, group: p.group, argv: []string{selfPath, "load", string(argument)},
		log: filepath.Join(l.dir, "idle.log"), spawn: l.spawn,
	}.start()
}

// awaitHeld waits for the client's word that its connections are open.
func awaitHeld(ctx context.Context, p *process, connections int) error {
	for wait := 0; wait < 600 && ctx.Err() == nil; wait++ {
		content, err := os.ReadFile(p.log)
		if err != nil {
			return err
		}
		var r load.Result
		if json.Unmarshal(content, &r) == nil {
			if int(r.Units) != connections {
				return fmt.Errorf("%d of %d connections open: %s", int(r.Units), connections, r.First)
			}
			return nil
		}
		if err := p.ended(); err != nil {
			return err
		}
		time.Sleep(100 * time.Millisecond)
	}
	return fmt.Errorf("connections are not open after a minute")
}
