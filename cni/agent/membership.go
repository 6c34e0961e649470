package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"time"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"

	"github.com/fairlead-mesh/fairlead/cni/plugin"
)

// recordEvery bounds how long the record of the mesh on disk is behind.
const recordEvery = 250 * time.Millisecond

// keepMembership writes who is in the mesh to the node's disk whenever it has changed, until ctx ends. The CNI plugin reads
// it when there is no agent to ask.
func (a *agent) keepMembership(ctx context.Context) error {
	if a.cfg.Record == "" {
		return nil
	}
	written, _ := os.ReadFile(a.cfg.Record)
	former, _, err := plugin.ReadRecord(a.cfg.Record)
	if err != nil {
		a.log.Warn("the record of the mesh is begun anew", zap.Error(err))
	}
	failed, forgotten := false, a.cfg.PluginAccess == ""
	for {
		if a.started.Load() {
			former = a.watch.membership(former.Single)
			text, err := json.Marshal(former)
			if err == nil && !bytes.Equal(text, written) {
				if err = writeDurably(a.cfg.Record, text); err == nil {
					written = text
				}
			}
			if err == nil && !forgotten { // it is in the record now
				err = plugin.ForgetHeld(a.cfg.PluginAccess)
				forgotten = true
			}
			if err != nil && !failed {
				a.log.Error("the record of the mesh is not written: after a reboot pods may wait that need not", zap.Error(err))
			}
			failed = err != nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(recordEvery):
		}
	}
}

// membership is who is in the mesh now. A namespace counts as the mesh's when one of its pods is for itself: of a pod of it
// that nobody has seen yet, only the API server knows. That stays so when the pod is gone, because another one takes its
// place; single are the namespaces that the record before has for that reason.
func (w *watcher) membership(single []string) plugin.Record {
	r := plugin.Record{Namespaces: []string{}, Pods: map[string]bool{}}
	labelled := map[string]*corev1.Namespace{}
	for _, object := range w.namespaces.List() {
		namespace := object.(*corev1.Namespace)
		labelled[namespace.Name] = namespace
		if namespace.Labels[modeLabel] == modeAmbient && !slices.Contains(w.exclude, namespace.Name) {
			r.Namespaces = append(r.Namespaces, namespace.Name)
		}
	}
	for _, object := range w.pods.List() {
		pod := object.(*corev1.Pod)
		member := decide(pod, labelled[pod.Namespace], w.exclude).Enrol
		for _, uid := range []string{string(pod.UID), pod.Annotations[mirrorAnnotation]} {
			if uid != "" {
				r.Pods[uid] = member
			}
		}
		if member && !slices.Contains(r.Namespaces, pod.Namespace) {
			r.Namespaces = append(r.Namespaces, pod.Namespace)
			r.Single = append(r.Single, pod.Namespace)
		}
	}
	for _, name := range single {
		if namespace := labelled[name]; namespace != nil && namespace.Labels[modeLabel] != modeAmbient && !slices.Contains(r.Single, name) {
			r.Single = append(r.Single, name)
		}
	}
	slices.Sort(r.Namespaces)
	slices.Sort(r.Single)
	return r
}

// writeDurably replaces a file, which is root's alone, as a whole, so that it is there after a power cut.
func writeDurably(path string, content []byte) error {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, ".new-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // after the rename there is none of that name
	_, err = f.Write(content)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
