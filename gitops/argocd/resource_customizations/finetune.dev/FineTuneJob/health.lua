-- What Argo CD shows for a FineTuneJob. Reads the conditions; status.state and progress only make the message.
-- Argo CD opens no string library for it.
local hs = {status = "Progressing", message = "Waiting for the finetune-operator."}
local status = obj.status
if status == nil or status.conditions == nil then
  return hs
end

local conditions = {}
for _, condition in ipairs(status.conditions) do
  conditions[condition.type] = condition
end

local function holds(type)
  return conditions[type] ~= nil and conditions[type].status == "True"
end

local function message(type)
  local condition = conditions[type]
  if condition.message ~= nil and condition.message ~= "" then
    return condition.message
  end
  return condition.reason
end

-- How an ended run ended does not depend on the generation: nothing of it can change any more.
if holds("Complete") then
  local doubtful = conditions["Healthy"] ~= nil and conditions["Healthy"].status == "False"
  return {status = "Healthy", message = message(doubtful and "Healthy" or "Complete")}
end
if holds("Failed") then
  return {status = "Degraded", message = message("Failed")}
end

if status.observedGeneration ~= nil and obj.metadata.generation ~= nil
    and status.observedGeneration < obj.metadata.generation then
  hs.message = "Waiting for the finetune-operator to see the change."
  return hs
end

local function refused(type)
  return conditions[type] ~= nil and conditions[type].status == "False"
end

if refused("Accepted") then
  return {status = "Degraded", message = message("Accepted")}
end
if holds("Stalled") then
  return {status = "Degraded", message = message("Stalled")}
end
if holds("Suspended") then
  return {status = "Suspended", message = message("Suspended")}
end

hs.message = status.state or "Pending"
local progress = status.progress
if status.state ~= "Running" and status.message ~= nil and status.message ~= "" then
  hs.message = hs.message .. ": " .. status.message
elseif progress ~= nil and progress.maxSteps ~= nil and progress.maxSteps > 0 then
  hs.message = hs.message .. ": step " .. (progress.step or 0) .. " of " .. progress.maxSteps
  if progress.loss ~= nil and progress.loss ~= "" then
    hs.message = hs.message .. ", loss " .. progress.loss
  end
  if progress.eta ~= nil and progress.eta ~= "" then
    hs.message = hs.message .. ", " .. progress.eta .. " to go"
  end
elseif refused("InputsReady") then
  hs.message = message("InputsReady")
elseif refused("PodsReady") then
  hs.message = message("PodsReady")
end
-- Not Degraded: a pass that failed is tried again, and a sync should not fail for an API server that is restarting.
if refused("Reconciled") then
  hs.message = message("Reconciled")
end
return hs
