package lab_test

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/testenv"
	"github.com/fairlead-mesh/fairlead/tests/netns/lab"
)

func TestMain(m *testing.M) {
	lab.RunIfChild()
	os.Exit(m.Run())
}

// TestPlainTrafficIsReadable is the control of everything that is tried on a lab: without a mesh its pods reach one
// another, in clear, and the capture reads every byte they say across the link.
func TestPlainTrafficIsReadable(t *testing.T) {
	testenv.RequireRoot(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	w, err := lab.New(lab.Options{Log: t.Logf})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := w.Namespace("default", nil); err != nil {
		t.Fatal(err)
	}
	pods := map[string]*lab.Pod{}
	for name, node := range map[string]int{"client": 0, "near": 0, "far": 1} {
		if pods[name], err = w.Pod(ctx, lab.PodSpec{Namespace: "default", Name: name, Node: node}); err != nil {
			t.Fatal(err)
		}
	}
	const size = 100_000
	for _, tc := range []struct {
		name, server string
		http, v6     bool
		clear        int64
	}{
		{name: "TCP to the other node", server: "far", clear: 2 * size},
		{name: "TCP to the other node over IPv6", server: "far", v6: true, clear: 2 * size},
		{name: "HTTP to the other node", server: "far", http: true, clear: size},
		{name: "TCP to the same node", server: "near"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			port := uint16(lab.PortTCP)
			if tc.http {
				port = lab.PortHTTP
			}
			before, err := w.Wire.Total()
			if err != nil {
				t.Fatal(err)
			}
			call := lab.Call{To: pods[tc.server].Addr(port, tc.v6), HTTP: tc.http, Size: size}
			answer, err := pods["client"].Call(ctx, call)
			if err != nil {
				t.Fatal(err)
			}
			if last := answer.Last(); !answer.OK() || last.Server != tc.server {
				t.Fatalf("answer: %v", answer)
			}
			seen, err := w.Wire.Since(before)
			if err != nil {
				t.Fatal(err)
			}
			// Greetings and HTTP heads come on top, and a marker that two packets share is not counted.
			if seen.Clear < tc.clear || seen.Clear > tc.clear+2000 || seen.Tunnel != 0 {
				t.Errorf("captured %+v, want about %d bytes in clear", seen, tc.clear)
			}
			if want := tc.clear / int64(len(lab.Marker)); seen.Markers < want*9/10 {
				t.Errorf("read the payload %d times of %d", seen.Markers, want)
			}
		})
	}
}
