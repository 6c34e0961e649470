package e2e

import (
	"bytes"
	"fmt"
	"testing"
	"time"
)

func TestKilledProxyLeaksNothingAndComesBack(t *testing.T) {
	w := newWorld(t, "killed", "alice")
	w.join(t)
	mark := fmt.Sprintf("killed-%d", time.Now().UnixNano())
	c := startCapture(t, "node2")
	// By its address: names asked for while the proxy is away are answered when the resolver asks again, seconds later.
	server := kubectl(t, "-n", w.namespace, "get", "service", "server", "-o", "jsonpath={.spec.clusterIP}")
	load := w.start(t, "alice", "http://"+server+"/", "-n", "1500", "-interval", "20ms", "-timeout", "1s", "-method", "POST", "-d", mark)
	time.Sleep(2 * time.Second)

	killed := time.Now()
	if _, err := testLab.exec("node1", "pkill", "-9", "-x", "ztunnel"); err != nil {
		t.Fatal(err)
	}
	var back time.Time
	eventually(t, 60*time.Second, "ztunnel of node1 is running again", func() error {
		started := kubectl(t, "-n", "istio-system", "get", "pod", "-l", "app=ztunnel", "--field-selector", "spec.nodeName=node1",
			"-o", "jsonpath={.items[0].status.containerStatuses[0].state.running.startedAt}")
		at, err := time.Parse(time.RFC3339, started)
		if err != nil {
			return fmt.Errorf("started %q: %w", started, err)
		}
		if at.Before(killed.Truncate(time.Second)) {
			return fmt.Errorf("still the one of %v", at)
		}
		back = at
		return nil
	})

	refused, after := 0, 0
	for _, a := range load.wait(t) {
		switch {
		case a.Time.Before(killed.Add(-time.Second)): // and ended by then
			if !a.ok() {
				t.Errorf("before the kill: %v", a)
			}
		case a.Time.After(back.Add(2 * time.Second)): // startedAt is in whole seconds, rounded down
			after++
			if !a.ok() {
				t.Errorf("%v after the proxy's return: %v", a.Time.Sub(back), a)
			}
		case !a.ok():
			refused++
		}
	}
	if refused == 0 || after == 0 {
		t.Errorf("%d requests refused while the proxy was away, %d made after its return: want some of both", refused, after)
	}
	if n := bytes.Count(c.stop(t), []byte(mark)); n != 0 {
		t.Errorf("the payload was readable %d times", n)
	}
}
